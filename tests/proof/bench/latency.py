"""How long from commit to the start of the consumer, beside a message that needs no database to be sent."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import dramatiq

from service.ledger.ids import delivery_id, new_event_id
from tests.proof.bench.plain import plain_broker
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

    Pooled = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]

__all__ = ["Latency", "idle", "idle_baseline", "under_load"]

_INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES ($1, $2, 'bench.ordered', 1, 'bench.effect', 'bench', $3, '{}')
"""


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    p50: float
    p99: float
    worst: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """From all waits of a run."""
        waits = sorted(each * 1000 for each in seconds)
        return cls(statistics.median(waits), waits[min(int(len(waits) * 0.99), len(waits) - 1)], waits[-1])


async def _insert(connection: Connection | Pooled, order: UUID) -> float:
    """Commit an event; when the COMMIT was sent."""
    event = new_event_id()
    payload = json.dumps({"order_id": str(order), "customer": "c-123"})
    sent = time.time()
    await connection.execute(_INSERT, delivery_id(event, 1), event, payload)
    return sent


async def _waits(connection: Connection, sent: dict[UUID, float]) -> list[float]:
    await until(lambda: _effects(connection, len(sent)), timeout=60)
    rows = await connection.fetch("SELECT order_id, started FROM bench_effect")
    started = {row["order_id"]: row["started"] for row in rows}
    assert len(started) == len(sent)
    return [started[order] - moment for order, moment in sent.items()]


async def _effects(connection: Connection, expected: int) -> bool:
    count: int = await connection.fetchval("SELECT count(*) FROM bench_effect")
    return count >= expected


async def _one_by_one(
    connection: Connection, count: int, send: Callable[[UUID], Awaitable[float]], pause: Callable[[], float]
) -> Latency:
    sent: dict[UUID, float] = {}
    for _ in range(count + 20):
        order = uuid4()
        sent[order] = await send(order)
        await asyncio.sleep(pause())
    waits = await _waits(connection, sent)
    return Latency.of(waits[20:])


def _idle_pause() -> float:
    # Not a fixed beat: it could fall into step with somebody's polling.
    return random.uniform(0.02, 0.12)


async def idle(stage: Stage, count: int, broker: str) -> Latency:
    """An event at a time on an idle stack of one relay and one worker process."""
    async with stage.database() as database, stage.relay(database, broker), stage.worker(database, broker=broker):
        connection = await asyncpg.connect(database)
        try:
            return await _one_by_one(connection, count, lambda order: _insert(connection, order), _idle_pause)
        finally:
            await connection.close()


async def idle_baseline(stage: Stage, count: int, broker: str) -> Latency:
    """A message at a time, sent straight to Dramatiq's own worker and broker; no ledger."""
    async with stage.database() as database, stage.worker(database, app="plain", broker=broker):
        connection = await asyncpg.connect(database)
        sender = plain_broker(stage.settings(database, broker).broker)
        sender.declare_queue("bench")

        async def send(order: UUID) -> float:
            message: dramatiq.Message[None] = dramatiq.Message("bench", "bench.effect", (str(order),), {}, {})
            began = time.time()
            await asyncio.to_thread(sender.enqueue, message)
            return began

        try:
            return await _one_by_one(connection, count, send, _idle_pause)
        finally:
            sender.close()
            await connection.close()


async def under_load(stage: Stage, per_second: float, seconds: float) -> Latency:
    """The same at a steady rate of events per second, each in a transaction of its own.

    What was sent in the first second is not counted: the worker opens its connections then.
    """
    async with stage.database() as database, stage.relay(database), stage.worker(database):
        pool = await asyncpg.create_pool(database, min_size=4, max_size=4)
        sent: dict[UUID, float] = {}

        async def one(order: UUID) -> None:
            async with pool.acquire() as connection:
                sent[order] = await _insert(connection, order)

        async with pool, asyncio.TaskGroup() as group:
            began = time.perf_counter()
            for number in range(int(per_second * (1 + seconds))):
                group.create_task(one(uuid4()))
                await asyncio.sleep(max(began + (number + 1) / per_second - time.perf_counter(), 0))
        connection = await asyncpg.connect(database)
        try:
            waits = await _waits(connection, sent)
            return Latency.of(waits[int(per_second) :])
        finally:
            await connection.close()
