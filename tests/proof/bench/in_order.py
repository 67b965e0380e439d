"""What it costs to run in order: a drain over many keys and over few, and how fast one key goes."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import asyncpg

from tests.proof.bench.latency import Latency
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from tests.proof.bench.stage import Stage

__all__ = ["Chain", "chain", "drained"]

# As the triggers would have left it, had each row been published in a transaction of its own.
_FILL = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers,
                            lane, position, due_at)
SELECT (event || '01')::uuid, (event || '00')::uuid,
       CASE WHEN $2 > 0 THEN 'bench.ordered_by_customer' ELSE 'bench.ordered' END, 1,
       CASE WHEN $2 > 0 THEN 'bench.in_order' ELSE 'bench.effect' END, 'bench',
       jsonb_build_object('order_id', gen_random_uuid(), 'customer', 'c-123'), '{}',
       CASE WHEN $2 > 0 THEN 'bench:' || number % $2 END, CASE WHEN $2 > 0 THEN nextval('outbox_position') END,
       CASE WHEN $2 = 0 OR number <= $2 THEN clock_timestamp() ELSE outbox_parked() END
FROM (
    SELECT number, lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
           || substr(md5(random()::text), 1, 3) || '8' || substr(md5(number::text || random()::text), 1, 13) AS event
    FROM generate_series(1, $1::int) AS number
) AS events
"""


async def drained(stage: Stage, rows: int, keys: int, seconds: float) -> float:
    """Effects a second of a backlog, through relay and worker.

    Args:
        stage: The servers.
        rows: How long the backlog is.
        keys: How many keys it has; 0 for no order.
        seconds: For how long it is drained.
    """
    async with stage.database() as database:
        connection = await asyncpg.connect(database)
        try:
            await connection.execute("ALTER TABLE outbox_message DISABLE TRIGGER outbox_enter_lane")
            await connection.execute(_FILL, rows, keys)
            await connection.execute("ALTER TABLE outbox_message ENABLE TRIGGER outbox_enter_lane")
            await connection.execute("ANALYZE outbox_message")
            async with stage.relay(database, OUTBOX__HIGH_WATER_MARK="5000"), stage.worker(database):
                await until(lambda: _effects(connection, 100), timeout=60)
                before: int = await connection.fetchval("SELECT count(*) FROM bench_effect")
                began = time.monotonic()
                await asyncio.sleep(seconds)
                done: int = await connection.fetchval("SELECT count(*) FROM bench_effect")
                rate = (done - before) / (time.monotonic() - began)
                assert done < rows, "it was drained too early"
                return rate
        finally:
            await connection.close()


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
SELECT (event || '01')::uuid, (event || '00')::uuid, 'bench.ordered_by_customer', 1, 'bench.in_order', 'bench',
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
