"""What it costs to run in order: a drain over many keys and over few, and how fast one key goes."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg

from service.database.driver import bound_waits
from service.ledger import delivering
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from tests.proof.bench.latency import Latency
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.delivering import Claim
    from tests.proof.bench.stage import Stage

__all__ = ["Chain", "chain", "drained"]

_MINUTE = timedelta(seconds=60)

# As the triggers would have left it, had each row been published in a transaction of its own.
_FILL = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers,
                            lane, position, due_at)
SELECT (event || '01')::uuid, (event || '00')::uuid, 'bench.ordered', 1, 'bench.effect', 'bench',
       jsonb_build_object('order_id', gen_random_uuid(), 'customer', 'c-123'), '{}',
       CASE WHEN $2 > 0 THEN 'bench:' || number % $2 END, CASE WHEN $2 > 0 THEN nextval('outbox_position') END,
       CASE WHEN $2 = 0 OR number <= $2 THEN clock_timestamp() ELSE outbox_parked() END
FROM (
    SELECT number, lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
           || substr(md5(random()::text), 1, 3) || '8' || substr(md5(number::text || random()::text), 1, 13) AS event
    FROM generate_series(1, $1::int) AS number
) AS events
"""
_EFFECT = "INSERT INTO bench_effect (order_id) VALUES ($1)"


async def drained(stage: Stage, rows: int, keys: int, seconds: float) -> float:
    """Effects a second of a backlog: hand-over, claims in groups, and eight transactions at a time that complete.

    Args:
        stage: The servers.
        rows: How long the backlog is.
        keys: How many keys it has; 0 for no order.
        seconds: For how long it is drained.
    """
    async with stage.database() as database, AsyncExitStack() as stack:
        opened = [await asyncpg.connect(database) for _ in range(10)]
        for each in opened:
            stack.push_async_callback(each.close)
            await bound_waits(each)
        relay, ledger, *workers = opened
        await relay.execute("SET plan_cache_mode = force_custom_plan; SET enable_sort = off")
        await relay.execute("SET statement_timeout = 0; ALTER TABLE outbox_message DISABLE TRIGGER outbox_enter_lane")
        await relay.execute(_FILL, rows, keys)
        await relay.execute("ALTER TABLE outbox_message ENABLE TRIGGER outbox_enter_lane; ANALYZE outbox_message")
        return await _drain(relay, ledger, workers, seconds)


async def _drain(relay: Connection, ledger: Connection, workers: list[Connection], seconds: float) -> float:
    claims: asyncio.Queue[Claim] = asyncio.Queue()
    done = 0

    async def work(connection: Connection) -> None:
        nonlocal done
        while True:
            claim = await claims.get()
            async with connection.transaction():
                await connection.execute(_EFFECT, claim.event_id)
                assert await delivering.complete(connection, claim)
            done += 1

    working = [asyncio.create_task(work(each)) for each in workers]
    began = swept = time.monotonic()
    floor = NO_FLOOR
    while time.monotonic() < began + seconds:
        if claims.qsize() > 500:
            await asyncio.sleep(0.001)
            continue
        if time.monotonic() > swept + 1:
            floor, swept = NO_FLOOR, time.monotonic()
        async with relay.transaction():
            pauses = Pauses(_MINUTE, _MINUTE, _MINUTE)
            batch = await take_due(relay, "bench", floor, 500, pauses, expired_leases=True)
        if batch is None:
            floor = NO_FLOOR
            await asyncio.sleep(0.0005)
            continue
        floor = batch.floor
        asked = [(UUID(each.delivery_id), uuid4()) for each in batch.deliveries]
        for claim in await delivering.claim_free(ledger, asked, _MINUTE):
            claims.put_nowait(claim)
    rate = done / (time.monotonic() - began)
    for task in working:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return rate


@dataclass(frozen=True)
class Chain:
    """Deliveries one after the other. `gap` is from one's commit to the start of the next."""

    rate: float
    gap: Latency


async def chain(stage: Stage, count: int) -> Chain:
    """So many events of one key, through relay and worker."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        try:
            async with stage.relay(database), stage.worker(database):
                await connection.execute(_PUBLISH, 50, "warm")
                await until(lambda: _effects(connection, 50), timeout=60)
                await connection.execute("TRUNCATE bench_effect")
                await connection.execute(_PUBLISH, count, "one")
                await until(lambda: _effects(connection, count), timeout=120, every=0.2)
                rows = await connection.fetch(
                    "SELECT started, extract(epoch FROM at)::float8 AS at FROM bench_effect ORDER BY id"
                )
        finally:
            await connection.close()
    gaps = [after["started"] - before["at"] for before, after in pairwise(rows)]
    assert min(gaps) > -0.001, "two at a time"
    return Chain(count / (rows[-1]["at"] - rows[0]["started"]), Latency.of(gaps))


_PUBLISH = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, lane, due_at)
SELECT (event || '01')::uuid, (event || '00')::uuid, 'bench.ordered', 1, 'bench.effect', 'bench',
       jsonb_build_object('order_id', gen_random_uuid(), 'customer', 'c-123'), '{}', $2, outbox_parked()
FROM (
    SELECT lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
           || substr(md5(random()::text), 1, 3) || '8' || substr(md5(number::text || random()::text), 1, 13) AS event
    FROM generate_series(1, $1::int) AS number
) AS events
"""


async def _effects(connection: Connection, expected: int) -> bool:
    count: int = await connection.fetchval("SELECT count(*) FROM bench_effect")
    return count >= expected
