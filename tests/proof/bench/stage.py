"""The servers that are measured on, the processes on them, and what the kernel says they cost."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pika
import pika.exceptions
import psutil
import redis
from pydantic import SecretStr

from service.dev.issuer import DevIssuer
from service.dev.places import scratch
from service.dev.postgres import Postgres
from service.dev.processes import Process
from service.dev.valkey import Valkey
from service.settings import BrokerSettings, DatabaseSettings, OutboxSettings, Settings
from tests.proof.bench.app import SCHEMA
from tests.proof.rabbitmq.server import Rabbitmq, programs
from tests.servers.real_servers import migrate, outside_environment
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


__all__ = ["GATHERED", "INSERT", "RAW", "WAITING", "Running", "Stage", "open_stage"]

# PostgreSQL as it is installed, durable, with memory and room for the log that suit the machine; the same for all.
_POSTGRES = {
    "shared_buffers": "2GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "30min",
    "track_io_timing": "off",
}

INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT (event || lpad(to_hex(1), 2, '0'))::uuid, (event || '00')::uuid, 'bench.ordered', 1, 'bench.effect', 'bench',
       jsonb_build_object('order_id', gen_random_uuid(), 'customer', 'c-123'),
       '{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}'
FROM (
    SELECT lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7'
           || substr(md5(random()::text), 1, 3) || '8' || substr(md5(number::text || random()::text), 1, 13) AS event
    FROM generate_series(1, $1::int) AS number
) AS events
"""
"""Adds so many rows, shaped as `publish` writes them."""

WAITING = INSERT.replace("'bench.ordered'", "'bench.waited'").replace("'bench.effect'", "'bench.wait'")
"""The same for the consumer that waits before its effect."""

RAW = INSERT.replace("'bench.ordered'", "'bench.raw'").replace("'bench.effect'", "'bench.raw'")
"""The same for the consumer whose effect needs no session."""

GATHERED = INSERT.replace("'bench.ordered'", "'bench.gathered'").replace("'bench.effect'", "'bench.gather'")
"""The same for the batch consumer."""


@dataclass
class Running:
    """A process that is measured."""

    process: Process
    lines: list[str] = field(default_factory=list)

    def said(self, text: str) -> bool:
        """Whether it printed it."""
        return any(text in line for line in self.lines)

    def family(self) -> list[psutil.Process]:
        """The process and its children."""
        assert self.process.pid is not None, self.lines[-5:]
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds of CPU so far."""
        return sum(sum(each.cpu_times()[:2]) for each in self.family())

    def memory(self) -> int:
        """Bytes resident now."""
        return sum(each.memory_info().rss for each in self.family())


class Stage:
    """The servers. Each measurement takes a database and a broker database of its own."""

    def __init__(self, postgres: Postgres, valkey: Valkey, rabbitmq: Rabbitmq | None, issuer: DevIssuer) -> None:
        self.postgres = postgres
        self.valkey = valkey
        self.rabbitmq = rabbitmq
        self.issuer = issuer
        self.redis = redis.Redis.from_url(valkey.url)

    @asynccontextmanager
    async def database(self, template: str = "service") -> AsyncIterator[str]:
        """The URL of a new database, which is dropped afterwards."""
        name = f"bench_{uuid4().hex[:12]}"
        await asyncio.to_thread(self.postgres.sql, f'CREATE DATABASE {name} TEMPLATE "{template}"')
        try:
            yield self.postgres.url(name)
        finally:
            await asyncio.to_thread(self.postgres.sql, f"DROP DATABASE {name} WITH (FORCE)")
            self.redis.flushall()

    def broker_url(self, broker: str) -> str:
        """`broker` is `valkey` or `rabbitmq`."""
        if broker == "valkey":
            return self.valkey.url
        assert self.rabbitmq is not None
        return self.rabbitmq.url

    def settings(self, database: str, broker: str = "valkey") -> Settings:
        """The service's settings for this database, with no limit that a backlog would run into."""
        return Settings(
            database=DatabaseSettings(url=SecretStr(database)),
            broker=BrokerSettings(url=SecretStr(self.broker_url(broker))),
            outbox=OutboxSettings(high_water_mark=1_000_000),
            log_level="WARNING",
        )

    def environment(self, database: str, broker: str = "valkey", **settings: str) -> dict[str, str]:
        """What a process of the service is told."""
        return (
            outside_environment()
            | {"DATABASE__URL": database, "BROKER__URL": self.broker_url(broker), "PYTHONUNBUFFERED": "1"}
            | self.issuer.variables
            | {"OUTBOX__HIGH_WATER_MARK": "1000000", "LOG_FORMAT": "json"}
            | {"BENCH_POSTGRES": database, "BENCH_VALKEY": self.valkey.url}
            | settings
        )

    @asynccontextmanager
    async def running(self, *command: str, environment: dict[str, str], ready: str | None) -> AsyncIterator[Running]:
        """A process of Python's, from when it said `ready`, if anything, until the end of the block."""
        lines: list[str] = []
        process = Process(
            command[0], [sys.executable, "-m", *command], environment, lambda _name, line: lines.append(line)
        )
        run = Running(process, lines)
        process.start()
        try:
            await until(
                lambda: ready is None or run.said(ready) or process.exit_code is not None,
                timeout=60,
                what=f"{command}: {ready}",
            )
            if process.exit_code is not None:
                raise ChildProcessError(f"{' '.join(command)} ended with {process.exit_code}: {lines[-5:]}")
            yield run
        finally:
            await asyncio.to_thread(process.stop)

    @asynccontextmanager
    async def relay(self, database: str, broker: str = "valkey", **settings: str) -> AsyncIterator[Running]:
        """The relay, as it is deployed."""
        environment = self.environment(database, broker, **settings)
        async with self.running("relay", "relay", environment=environment, ready="relay.started") as run:
            yield run

    @asynccontextmanager
    async def worker(
        self,
        database: str,
        *,
        app: str = "app",
        threads: int = 8,
        processes: int = 1,
        broker: str = "valkey",
        **settings: str,
    ) -> AsyncIterator[Running]:
        """Worker processes: the service's (`app`) or those without a ledger (`plain`)."""
        environment = self.environment(database, broker, **settings)
        broker_of = f"tests.proof.bench.{app}:setup_broker"
        command = ("dramatiq", broker_of, "-p", str(processes), "-t", str(threads))
        async with self.running(*command, environment=environment, ready="ready for action") as run:
            yield run

    def waiting(self, queue: str = "bench", broker: str = "valkey") -> int:
        """Messages in a queue of the broker."""
        if broker == "valkey":
            return int(self.redis.llen(f"dramatiq:{queue}"))
        try:
            with self._channel() as channel:
                return int(channel.queue_declare(queue, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:  # nobody has declared it yet
            return 0

    def empty_rabbitmq(self, queue: str = "bench") -> None:
        """Forget the messages in a queue."""
        with self._channel() as channel:
            channel.queue_purge(queue)

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        with pika.BlockingConnection(pika.URLParameters(self.broker_url("rabbitmq"))) as connection:
            yield connection.channel()


@contextmanager
def _servers(folder: Path) -> Iterator[Stage]:
    with Postgres(folder / "postgres", settings=_POSTGRES) as postgres, Valkey(folder / "valkey") as valkey:
        url = postgres.ensure_database("service")
        migrate(url)
        postgres.sql(SCHEMA, "service")
        issuer = DevIssuer(folder / "issuer")
        if programs() is None:
            yield Stage(postgres, valkey, None, issuer)
        else:
            with Rabbitmq(folder / "rabbitmq") as rabbitmq:
                yield Stage(postgres, valkey, rabbitmq, issuer)


@contextmanager
def open_stage() -> Iterator[Stage]:
    """Start the servers; RabbitMQ only where it is installed."""
    os.environ.pop("PYTHONPATH", None)
    with scratch() as folder, _servers(folder) as stage:
        yield stage
