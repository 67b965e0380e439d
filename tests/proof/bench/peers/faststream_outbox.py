"""faststream-outbox: a FastStream broker over an outbox table; a subscriber with a stacked publisher is the relay.

Like ours: the event commits with the business row; claims are leases, fenced by a token; at-least-once; retries with
backoff. Unlike ours: a row is deleted once the broker took it, so what the broker or a consumer loses afterwards is
lost; a broker outage burns attempts (after ten the row is dropped, or archived in the DLQ table, which is opt-in and is
used here); nothing makes an effect happen once; replay is the user's own SQL.

By default it logs two lines for every message, at INFO. Here it is given a logger that begins at WARNING, as all that
is measured does.
"""

from __future__ import annotations

import logging
from typing import Any

from faststream import FastStream
from faststream.redis import RedisBroker
from faststream_outbox import OutboxBroker, make_dlq_table, make_outbox_table
from faststream_outbox.autovacuum import outbox_autovacuum_ddl
from sqlalchemy import MetaData, Table, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.proof.bench.peers.roles import LIST, Options, ready, run

_QUEUE = "orders_outbox"

# As `publish` writes them, with one notification for the whole transaction instead of one for each row.
_LOAD = """
INSERT INTO outbox (queue, payload, headers)
SELECT :queue,
       convert_to(json_build_object('order_id', gen_random_uuid(), 'customer', 'c-123')::text, 'UTF8'),
       jsonb_build_object('content-type', 'application/json', 'correlation_id', gen_random_uuid())
FROM generate_series(1, :count)
"""

_WORKERS = 8
_TUNED: dict[str, Any] = {
    "max_workers": _WORKERS,
    "fetch_batch_size": 500,
    "min_fetch_interval": 0.05,
    "terminal_flush_batch_size": 50,
}


async def prepare(options: Options) -> None:
    metadata, _outbox, _dead = _tables()
    engine = _engine(options)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl("outbox")))
    await engine.dispose()


async def load(options: Options) -> None:
    engine = _engine(options)
    async with engine.begin() as connection:
        await connection.execute(text(_LOAD), {"queue": _QUEUE, "count": options.count})
        await connection.execute(text("ANALYZE outbox"))
        await connection.execute(text("SELECT pg_notify('outbox_outbox', :queue)"), {"queue": _QUEUE})
    await engine.dispose()


async def relay(options: Options) -> None:
    _metadata, outbox, dead = _tables()
    logger = logging.getLogger("bench")  # the level of the root: WARNING
    valkey = RedisBroker(options.valkey, logger=logger)
    broker = OutboxBroker(_engine(options), outbox_table=outbox, dlq_table=dead, logger=logger)

    async def move(body: dict[str, str]) -> dict[str, str]:
        return body

    subscriber = broker.subscriber(_QUEUE, **(_TUNED if options.tuned else {}))
    valkey.publisher(list=LIST)(subscriber(move))

    async def started() -> None:
        ready()

    await FastStream(broker, on_startup=[valkey.connect], after_startup=[started], logger=logger).run()
    await valkey.stop()


def _tables() -> tuple[MetaData, Table, Table]:
    metadata = MetaData()
    return metadata, make_outbox_table(metadata, table_name="outbox"), make_dlq_table(metadata)


def _engine(options: Options) -> AsyncEngine:
    url = make_url(options.postgres).set(drivername="postgresql+asyncpg")
    return create_async_engine(url, pool_size=_WORKERS + 2 if options.tuned else 5)


if __name__ == "__main__":
    run(prepare=prepare, load=load, relay=relay)
