"""Whether the drain stays as fast: long backlog, old transaction, much history, after a rest, beside another relay.

Every figure is a pair of rates from the same database server, the usual state first and the hard one second.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg

from service.database.driver import connect
from service.ledger import delivering
from tests.proof.bench.drain import drained
from tests.proof.bench.stage import INSERT
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

__all__ = ["backlog", "burst_after_rest", "held_transaction", "history", "relay_memory", "two_relays", "worker_memory"]

# Rows as a worker leaves them behind; older than any that are open.
_HISTORY = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, state, due_at,
                            attempts, dispatches, created_at, dispatched_at, started_at, completed_at)
SELECT (event || '01')::uuid, (event || '00')::uuid, 'bench.ordered', 1, 'bench.effect', 'bench',
       '{"order_id": "00000000-0000-4000-8000-000000000000", "customer": "c-123"}', '{}', 'completed', at,
       1, 1, at, at, at, at
FROM (
    SELECT lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint - 600000000 + number), 12, '0') || '7000' || '8'
           || substr(md5(number::text), 1, 13) AS event,
           now() - interval '6 days' AS at
    FROM generate_series($1::int, $2::int) AS number
) AS events
"""

_HANDED_OVER = "SELECT id FROM outbox_message WHERE state = 'dispatched' ORDER BY id DESC LIMIT $1"
_CLAIMED = 8_000
_TOGETHER = 8  # runs that begin together claim together, one for each thread

_KEPT = "SELECT count(*) FROM outbox_message WHERE state = 'completed'"


async def backlog(stage: Stage, length: int) -> float:
    """Rows per second when so many wait by the time that the relay, which runs already, first sees them."""
    async with stage.database() as database, stage.relay(database):
        connection = await asyncpg.connect(database)
        await drained(stage, connection, 2_000)
        stage.redis.flushall()  # a full million is as much as the relay lets wait
        rate = await drained(stage, connection, length)
        await connection.close()
        return rate


async def held_transaction(stage: Stage, before: int, rows: int, *, held: bool) -> float:
    """Rows per second after `before` rows went out, with a transaction open since before them or not."""
    async with stage.database() as database, stage.relay(database):
        connection, other = await asyncpg.connect(database), await asyncpg.connect(database)
        transaction = other.transaction(isolation="repeatable_read")
        if held:
            await transaction.start()
            await other.execute("SELECT count(*) FROM bench_order")
        await drained(stage, connection, before)
        rate = await drained(stage, connection, rows)
        if held:
            await transaction.rollback()
        await connection.close()
        await other.close()
        return rate


async def history(stage: Stage, kept: int, rows: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Rows drained and rows claimed per second, with so many completed rows kept and, next, with none.

    Then the same during their purge.
    """
    rates: dict[str, list[tuple[float, float]]] = {}

    def add(when: str, full: tuple[float, float], empty: tuple[float, float]) -> None:
        for what, much, none in zip(("drain", "claims"), full, empty, strict=True):
            rates.setdefault(f"{what} {when}", []).append((much, none))

    async with stage.database() as full, stage.database() as empty:
        connection = await asyncpg.connect(full)
        for first in range(1, kept, 500_000):
            await connection.execute(_HISTORY, first, min(first + 499_999, kept))
        await connection.execute("VACUUM ANALYZE outbox_message")
        for _ in range(rounds):
            add(f"with {kept:,} completed rows kept", await _rates(stage, full, rows), await _rates(stage, empty, rows))
        environment = stage.environment(full)
        for _ in range(rounds):
            async with stage.running(
                "relay", "purge", "--older-than", "1h", environment=environment, ready=None
            ) as purge:
                before = await connection.fetchval(_KEPT)
                meanwhile = await _rates(stage, full, rows)
                assert await connection.fetchval(_KEPT) < before, "nothing was purged meanwhile"
                assert purge.process.exit_code is None, "the purge was over before the drain and the claims"
            add("during their purge", meanwhile, await _rates(stage, empty, rows))
        await connection.close()
    return rates


async def _rates(stage: Stage, database: str, rows: int) -> tuple[float, float]:
    """Rows drained per second, after a few; and of those, rows claimed per second as one worker process does it."""
    settings = stage.settings(database).database
    async with stage.relay(database):
        connection = await connect(settings, "bench-claims")
        await drained(stage, connection, 2_000)
        drain = await drained(stage, connection, rows)
        stage.redis.flushall()
    ids = [row["id"] for row in await connection.fetch(_HANDED_OVER, _CLAIMED)]
    began = time.perf_counter()
    for first in range(0, _CLAIMED, _TOGETHER):
        asked = [(message_id, uuid4()) for message_id in ids[first : first + _TOGETHER]]
        assert len(await delivering.claim_free(connection, asked, timedelta(days=1))) == _TOGETHER
    claims = _CLAIMED / (time.perf_counter() - began)
    await connection.close()
    return drain, claims


async def burst_after_rest(stage: Stage, rows: int) -> tuple[float, float]:
    """Rows per second of a relay that is at work already, and of one that has slept through its whole life."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        async with stage.relay(database):
            await drained(stage, connection, 20_000)
            warm = await drained(stage, connection, rows)
        async with stage.relay(database):
            await until(lambda: _sleeps(connection))
            rested = await drained(stage, connection, rows)
        await connection.close()
        return warm, rested


async def _sleeps(connection: Connection) -> bool:
    """Whether a relay holds the lock that it sleeps under."""
    asleep: bool = await connection.fetchval(
        "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted)"
    )
    return asleep


async def two_relays(stage: Stage, rows: int, relays: int) -> float:
    """Rows per second of so many relays together."""
    async with stage.database() as database, AsyncExitStack() as stack:
        for _ in range(relays):
            await stack.enter_async_context(stage.relay(database))
        connection = await asyncpg.connect(database)
        await drained(stage, connection, 2_000)
        rate = await drained(stage, connection, rows)
        await connection.close()
        return rate


async def relay_memory(stage: Stage, rows: int, steps: int) -> list[float]:
    """MiB resident of the relay, after each of so many equal parts of a backlog."""
    sizes = []
    async with stage.database() as database, stage.relay(database) as relay:
        connection = await asyncpg.connect(database)
        await drained(stage, connection, 10_000)
        for _ in range(steps):
            await drained(stage, connection, rows // steps)
            sizes.append(relay.memory() / 2**20)
            stage.redis.flushall()
        await connection.close()
    return sizes


async def worker_memory(stage: Stage, events: int, steps: int) -> list[float]:
    """MiB resident of a worker, master and child, after each of so many equal parts of its work."""
    sizes = []
    async with stage.database() as database, stage.relay(database, OUTBOX__HIGH_WATER_MARK="5000"):
        connection = await asyncpg.connect(database)
        async with stage.worker(database) as worker:
            await connection.execute(INSERT, events)
            for step in range(1, steps + 1):
                await until(lambda: _reached(connection, events * step // steps), timeout=300, every=0.2)  # noqa: B023
                sizes.append(worker.memory() / 2**20)
        await connection.close()
    return sizes


async def _reached(connection: Connection, effects: int) -> bool:
    newest: int = await connection.fetchval("SELECT coalesce(max(id), 0) FROM bench_effect")
    return newest >= effects
