"""Measures the relay on RabbitMQ: `python -m tests.proof.rabbitmq.measure [ROWS]`.

In one run and on one machine: how fast a backlog drains, against a loop over Dramatiq's own `enqueue` with
`confirm_delivery=True`; and how long an idle stack takes from commit to the start of the consumer.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from pydantic import SecretStr

from service.settings import BrokerSettings, DatabaseSettings, OutboxSettings, Settings
from service.telemetry.logs import configure_logging
from tests.proof.ledger.domain import SCHEMA
from tests.proof.ledger.working import start_worker
from tests.proof.rabbitmq.server import Rabbitmq
from tests.servers.real_servers import TEMPLATE, RealServers, outside_environment
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection

_INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT id, id, 'ledger.happened', 1, 'ledger.react', $2, json_build_object('subject_id', id)::jsonb, '{}'
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1)) AS new
"""

_LEFT = "SELECT count(*) FROM outbox_message WHERE dispatches = 0"


async def _drain(settings: Settings, connection: Connection, rows: int) -> float:
    """Rows per second of a relay whose backlog is `rows`."""
    await connection.execute(_INSERT, rows, "drain")
    await connection.execute("VACUUM ANALYZE outbox_message")
    began = time.perf_counter()
    async with relaying(settings):
        await until(lambda: _none_left(connection), timeout=600, every=0.1)
        took = time.perf_counter() - began
    await connection.execute("DELETE FROM outbox_message")
    return rows / took


async def _none_left(connection: Connection) -> bool:
    return not await connection.fetchval(_LEFT)


def _loop(url: str, rows: int) -> float:
    """Messages per second of a loop that waits for each confirmation, without a database."""
    broker = RabbitmqBroker(url=url, confirm_delivery=True, middleware=[])
    began = time.perf_counter()
    for _ in range(rows):
        key = str(uuid4())
        message: dramatiq.Message[None] = dramatiq.Message("loop", "ledger.react", (key,), {}, {}, key)
        broker.enqueue(message)
    took = time.perf_counter() - began
    broker.flush("loop")
    broker.close()
    return rows / took


async def _latencies(
    settings: Settings, connection: Connection, environment: dict[str, str], folder: Path
) -> list[float]:
    """Milliseconds from commit to the start of the consumer, one event at a time."""
    await connection.execute(SCHEMA)
    worker = start_worker(environment, folder / "worker.log")
    try:
        await until(lambda: worker.says("ready for action"), timeout=60)
        async with relaying(settings):
            for _ in range(205):
                await connection.execute(_INSERT, 1, "ledger")
                await asyncio.sleep(0.05)
            await until(lambda: _all_started(connection), timeout=30)
    finally:
        await worker.stop()
    rows = await connection.fetch(
        "SELECT extract(epoch FROM started_at - created_at)::float8 * 1000 AS wait FROM outbox_message "
        "ORDER BY created_at"
    )
    return [row["wait"] for row in rows][5:]


async def _all_started(connection: Connection) -> bool:
    return not await connection.fetchval("SELECT count(*) FROM outbox_message WHERE started_at IS NULL")


async def _measure(rows: int, database: str, rabbitmq: Rabbitmq, folder: Path) -> None:
    settings = Settings(
        database=DatabaseSettings(url=SecretStr(database)),
        broker=BrokerSettings(url=SecretStr(rabbitmq.url)),
        outbox=OutboxSettings(high_water_mark=1_000_000),
        log_level="ERROR",
    )
    configure_logging(settings.log_format, settings.log_level)
    environment = outside_environment() | {"DATABASE__URL": database, "BROKER__URL": rabbitmq.url}
    connection = await asyncpg.connect(database)
    for number in range(3):
        drained = await _drain(settings, connection, rows)
        looped = await asyncio.to_thread(_loop, rabbitmq.url, rows // 10)
        print(f"{number + 1}: relay {drained:,.0f} rows/s, loop {looped:,.0f} messages/s, {drained / looped:.1f} times")
    waits = sorted(await _latencies(settings, connection, environment, folder))
    print(
        f"commit to start, idle, {len(waits)} events: p50 {statistics.median(waits):.1f} ms, "
        f"p99 {waits[int(len(waits) * 0.99)]:.1f} ms, worst {waits[-1]:.1f} ms"
    )
    await connection.close()


def main() -> None:
    """Start the servers, measure, stop them."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    servers = RealServers()
    with TemporaryDirectory() as folder:
        try:
            where = servers.start()
            with Rabbitmq(Path(folder) / "rabbitmq") as rabbitmq:
                database = where.postgres.replace("/postgres?", f"/{TEMPLATE}?")
                asyncio.run(_measure(rows, database, rabbitmq, Path(folder)))
        finally:
            servers.stop()


if __name__ == "__main__":
    main()
