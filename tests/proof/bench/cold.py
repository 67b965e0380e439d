"""How long one queue's events wait for the relay while another queue is long: one queue must not pay for another.

From commit to when the message is in the broker, where a client waits for it; no worker takes part. Each event's row
is gone before the next is written, as it is when a worker has completed it.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import redis.asyncio

from tests.proof.bench.latency import Latency
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

__all__ = ["SHORT", "beside_draining", "beside_full"]

_HOT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT gen_random_uuid(), gen_random_uuid(), 'bench.ordered', 1, 'bench.effect', 'hot',
       '{"order_id": "00000000-0000-4000-8000-000000000000", "customer": "c-123"}', '{}'
FROM generate_series(1, $1::int)
"""
_COLD = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES (gen_random_uuid(), gen_random_uuid(), 'bench.ordered', 1, 'bench.effect', $1, '{}', '{}')
"""
_MARK = 5_000
_NO_MARK = 1_000_000
"""Messages that may wait in a queue of the broker."""
SHORT = 500
"""Rows: a batch."""


class _Probe:
    """Publishes an event at a time and waits for it in the broker."""

    def __init__(self, connection: Connection, client: redis.asyncio.Redis) -> None:
        self._connection = connection
        self._client = client

    async def wait(self, queue: str = "cold") -> float:
        """Seconds that one event takes, after a pause that falls into step with nobody."""
        await asyncio.sleep(random.uniform(0.01, 0.05))
        began = time.perf_counter()
        await self._connection.execute(_COLD, queue)
        found = await self._client.blpop([f"dramatiq:{queue}"], timeout=60)
        waited = time.perf_counter() - began
        assert found, f"an event of {queue} was not handed over within a minute"
        await self._connection.execute("DELETE FROM outbox_message WHERE queue = $1", queue)
        await self._client.delete(f"dramatiq:{queue}.msgs")
        return waited


@asynccontextmanager
async def _probing(stage: Stage, mark: int) -> AsyncIterator[tuple[_Probe, Connection]]:
    """A relay at work that knows the cold queue, and a connection to fill the hot one with."""
    async with (
        stage.database() as database,
        stage.relay(database, OUTBOX__HIGH_WATER_MARK=str(mark)),
        redis.asyncio.Redis.from_url(stage.valkey.url) as client,
    ):
        connection, filler = await asyncpg.connect(database), await asyncpg.connect(database)
        try:
            probe = _Probe(connection, client)
            await probe.wait()
            yield probe, filler
        finally:
            await connection.close()
            await filler.close()


async def _fill(connection: Connection, rows: int) -> None:
    """One commit, so that all of them are waiting at once."""
    if rows:
        await connection.execute(_HOT, rows, timeout=300)


async def beside_full(stage: Stage, backlog: int, events: int) -> Latency:
    """Beside so many rows of a queue that takes none, because its mark in the broker is reached."""
    async with _probing(stage, _MARK) as (probe, filler):
        await _fill(filler, backlog)
        await until(lambda: stage.waiting("hot") >= min(_MARK, backlog))
        return Latency.of([await probe.wait() for _ in range(events)])


async def beside_draining(stage: Stage, backlog: int, events: int, *, new: bool = False) -> Latency:
    """While so many rows of another queue are handed over as fast as it goes; 0: it is kept as short as a batch.

    Args:
        new: Each event is in a queue that the relay has not met.
    """
    async with _probing(stage, _NO_MARK) as (probe, filler):
        waits: list[float] = []
        while len(waits) < events:
            async with _hot(stage, filler, backlog):
                while len(waits) < events and (not backlog or stage.waiting("hot") < backlog):
                    waits.append(await probe.wait(f"new-{len(waits)}" if new else "cold"))
        return Latency.of(waits)


@asynccontextmanager
async def _hot(stage: Stage, filler: Connection, backlog: int) -> AsyncIterator[None]:
    """A hot queue of that length at the beginning, or one that is kept short but never empty for long."""
    if backlog:
        await _fill(filler, backlog)
        yield
    else:
        feeding = asyncio.create_task(_feed(stage, filler))
        yield
        feeding.cancel()
        with suppress(asyncio.CancelledError):
            await feeding
    stage.redis.flushall()  # nobody consumes them


async def _feed(stage: Stage, filler: Connection) -> None:
    while True:
        await _fill(filler, SHORT)
        stage.redis.unlink("dramatiq:hot", "dramatiq:hot.msgs")
