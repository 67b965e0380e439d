"""How many effects a second one worker process has: with the ledger, without it, and on two other queues."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import dramatiq

from tests.proof.bench.cost import postgres_cpu
from tests.proof.bench.drain import once
from tests.proof.bench.plain import plain_broker
from tests.proof.bench.stage import GATHERED, INSERT, RAW, WAITING
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

__all__ = ["fill", "ledger", "peer", "plain", "processes", "rate"]

_SPAN = "SELECT count(*) AS count, extract(epoch FROM max(at) - min(at))::float8 AS seconds FROM bench_effect"
_DISTINCT = "SELECT count(DISTINCT order_id) FROM bench_effect"


async def rate(connection: Connection, expected: int) -> float:
    """Effects per second, from the first to the last."""
    await until(lambda: _at_least(connection, expected), timeout=600, every=0.2)
    await until(lambda: _all_there(connection, expected))  # the one with the last number need not be the last to commit
    row = await connection.fetchrow(_SPAN)
    assert row is not None
    assert row["count"] == expected == await connection.fetchval(_DISTINCT)
    return float(row["count"] / row["seconds"])


async def _all_there(connection: Connection, expected: int) -> bool:
    count: int = await connection.fetchval("SELECT count(*) FROM bench_effect")
    return count >= expected


async def _at_least(connection: Connection, expected: int) -> bool:
    newest: int = await connection.fetchval("SELECT coalesce(max(id), 0) FROM bench_effect")
    return newest >= expected


async def ledger(
    stage: Stage,
    count: int,
    threads: int,
    *,
    relaying: bool,
    kind: str = "effect",
    broker: str = "valkey",
    **settings: str,
) -> float:
    """Effects per second of one worker process of the service's.

    Args:
        stage: The servers.
        count: Events, all written before the worker starts.
        threads: Worker threads.
        relaying: Whether the relay works beside it, or has put all in the broker before the worker starts.
        kind: What the consumer does: `effect`, `wait` and then the effect, the same `raw`, without a session, or a
            `batch` of effects.
        broker: Between them.
        settings: The worker's.
    """
    insert = {"effect": INSERT, "wait": WAITING, "raw": RAW, "batch": GATHERED}[kind]
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        try:
            if relaying:
                async with (
                    stage.relay(database, broker, OUTBOX__HIGH_WATER_MARK="5000"),
                    stage.worker(database, threads=threads, processes=1, broker=broker, **settings),
                ):
                    await connection.execute(insert, count)
                    return await rate(connection, count)
            await fill(stage, database, connection, insert, count, broker)
            async with stage.worker(database, threads=threads, processes=1, broker=broker, **settings):
                return await rate(connection, count)
        finally:
            await connection.close()


async def fill(
    stage: Stage, database: str, connection: Connection, insert: str, count: int, broker: str = "valkey"
) -> None:
    """Let the relay put so many into the broker."""
    async with stage.relay(database, broker, OUTBOX__REDISPATCH_AFTER="600"):
        await connection.execute(insert, count)
        every = 0.01 if broker == "valkey" else 0.2  # asking RabbitMQ takes a connection
        await until(lambda: stage.waiting(broker=broker) >= count, timeout=60, every=every)


async def processes(stage: Stage, count: int, number: int) -> tuple[float, float]:
    """Effects per second of so many worker processes, and PostgreSQL's microseconds of CPU for each."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        try:
            await fill(stage, database, connection, INSERT, count)
            async with stage.worker(database, processes=number):
                before = postgres_cpu(stage)
                found = await rate(connection, count)
                return found, (postgres_cpu(stage) - before) / count * 1e6
        finally:
            await connection.close()


async def plain(stage: Stage, count: int, threads: int) -> float:
    """Effects per second of Dramatiq's own worker and broker, all messages sent before it starts."""
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        sender = plain_broker(stage.settings(database).broker)
        sender.declare_queue("bench")
        try:
            for _ in range(count):
                message: dramatiq.Message[None] = dramatiq.Message("bench", "bench.effect", (str(uuid4()),), {}, {})
                sender.enqueue(message)
            async with stage.worker(database, app="plain", threads=threads):
                return await rate(connection, count)
        finally:
            sender.close()
            await connection.close()


async def peer(stage: Stage, name: str, count: int, concurrency: int, *, tuned: bool) -> float:
    """Effects per second of another library's worker, all jobs written before it starts."""
    module = f"tests.proof.bench.peers.{name}"
    async with stage.database("template1") as database:
        environment = stage.environment(database)
        await once(module, "prepare", environment=environment)
        connection = await asyncpg.connect(database)
        try:
            await once(module, "load", str(count), environment=environment)
            arguments = ("--concurrency", str(concurrency), *(("--tuned",) if tuned else ()))
            async with stage.running(module, "worker", *arguments, environment=environment, ready="ready"):
                return await rate(connection, count)
        finally:
            await connection.close()
