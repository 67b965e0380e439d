"""What the demo runs on: servers and processes of its own, in a temporary folder, with shorter clocks.

A database or broker of the developer's is used without touching what is in it: the demo makes a database and a key
prefix of its own, and removes both.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import httpx
from redis.asyncio import Redis

from service.dev import stack
from service.dev.issuer import DevIssuer, every_scope
from service.dev.places import ServerError
from service.dev.processes import Process, stop_all
from service.dev.servers import free_port
from service.network.postgres_url import read_postgres
from service.settings import BrokerSettings, OutboxSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

CLOCK = {
    "OUTBOX__LEASE": "3",
    "OUTBOX__REDISPATCH_AFTER": "5",
    "OUTBOX__MIN_BACKOFF": "200",
    "OUTBOX__MAX_BACKOFF": "2000",
    "OUTBOX__SHUTDOWN_GRACE": "5",
}
"""Shorter than shipped, so that recovery takes seconds."""

REJECTED = "@nowhere.example"
"""The sink refuses recipients of this domain for good, until it is repaired."""

_SINK_DELAY = 0.08  # a mail server takes its time, and a worker can be killed meanwhile
_READY_TIMEOUT = 40.0


def shortened() -> list[str]:
    """The settings of the demo beside the shipped ones."""
    shipped = OutboxSettings()
    lines = []
    for variable, value in CLOCK.items():
        default = getattr(shipped, variable.removeprefix("OUTBOX__").lower())
        lines.append(f"{variable}={value} instead of {default:,}")
    return lines


@dataclass
class Stage:
    """Everything the demo's acts need."""

    environment: dict[str, str]
    folder: Path
    url: str
    token: str
    database: asyncpg.Pool[asyncpg.Record]
    broker: Redis
    namespace: str
    own_broker: bool
    processes: dict[str, Process]

    @property
    def mails(self) -> Path:
        return self.folder / "mails.jsonl"

    @property
    def reject_file(self) -> Path:
        """Whom the sink refuses."""
        return self.folder / "reject.txt"

    async def count(self, query: str) -> int:
        """The number that a query yields."""
        return int(await self.database.fetchval(query) or 0)

    def check(self) -> None:
        """Notice a process that ended by itself."""
        for name, process in self.processes.items():
            if process.exit_code is not None:
                raise ServerError(f"{name} ended by itself: {_last_line(self.folder / f'{name}.log')}")

    async def outbox(self, *arguments: str) -> str:
        """Run the real CLI and return what it prints."""
        process = await asyncio.create_subprocess_exec(
            *stack.outbox_command(),
            *arguments,
            cwd=self.folder,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise ServerError(f"`outbox {' '.join(arguments)}` ended with {process.returncode}: {output.decode()}")
        return output.decode().rstrip()


@asynccontextmanager
async def stage(folder: Path, say: Callable[[str], None]) -> AsyncIterator[Stage]:
    """Start everything, and say how far it is; afterwards nothing of it is left."""
    configured = stack.configured()
    if configured.get("BROKER__URL", "").startswith("amqp"):
        raise ServerError("the demo wipes its broker, and can do that to Redis and Valkey only: unset BROKER__URL")
    wanted = {key: configured[key] for key in stack.URLS if key in configured}
    inherited = {key: value for key, value in os.environ.items() if "__" not in key}
    async with AsyncExitStack() as cleanup:
        servers = stack.embedded_servers(inherited | wanted, folder, lasting=False)
        environment = cleanup.enter_context(servers)
        if "DATABASE__URL" in wanted:
            environment["DATABASE__URL"] = await cleanup.enter_async_context(
                _database_of_our_own(wanted["DATABASE__URL"])
            )
        namespace = f"outbox-demo-{uuid4().hex[:8]}"
        port, smtp_port = free_port(), free_port()
        issuer = DevIssuer(folder / "identity")
        environment |= (
            CLOCK
            | issuer.variables
            | {
                "BROKER__NAMESPACE": namespace,
                "SMTP__URL": f"smtp://127.0.0.1:{smtp_port}",
                "PYTHONUNBUFFERED": "1",
            }
        )
        say("the servers run; migrating")
        await asyncio.to_thread(stack.migrate, environment)
        pool = asyncpg.create_pool(read_postgres(environment["DATABASE__URL"]).dsn, min_size=1, max_size=4)
        database = await cleanup.enter_async_context(pool)
        told = BrokerSettings.model_validate({"url": environment["BROKER__URL"]})
        broker = Redis.from_url(told.redis_url, **told.redis_options)
        cleanup.push_async_callback(broker.aclose)
        if "BROKER__URL" in wanted:
            cleanup.push_async_callback(wipe_namespace, broker, namespace)
        processes = _processes(environment, folder, port, smtp_port)
        made = Stage(
            environment,
            folder,
            f"http://127.0.0.1:{port}",
            issuer.token("customers", every_scope()),
            database,
            broker,
            namespace,
            "BROKER__URL" not in wanted,
            processes,
        )
        made.reject_file.write_text(f"{REJECTED}$")
        cleanup.callback(_stop, processes)
        say("starting an API, two relays, two workers and a mail server")
        for process in processes.values():
            process.start()
        await _until_ready(made)
        yield made


@asynccontextmanager
async def _database_of_our_own(url: str) -> AsyncIterator[str]:
    name = f"outbox_demo_{uuid4().hex[:8]}"
    try:
        address = read_postgres(url)
    except ValueError as error:
        raise ServerError(f"DATABASE__URL: {error}") from None
    connection = await asyncpg.connect(address.dsn)
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield replace(address, database=name).dsn
        finally:
            await connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
    finally:
        await connection.close()


async def wipe_namespace(broker: Redis, namespace: str) -> None:
    """Remove the demo's keys from a broker that is not the demo's."""
    async for key in broker.scan_iter(match=f"{namespace}:*", count=1000):
        await broker.delete(key)


def _processes(environment: Mapping[str, str], folder: Path, port: int, smtp_port: int) -> dict[str, Process]:
    def write(name: str, line: str) -> None:
        with suppress(OSError), (folder / f"{name}.log").open("a") as log:
            log.write(line + "\n")

    sink = stack.sink_command(smtp_port, folder / "mails.jsonl", folder / "reject.txt", _SINK_DELAY)
    commands = {"mail": sink, "api": stack.api_command(port)}
    commands |= {name: stack.relay_command() for name in ("relay-1", "relay-2")}
    commands |= {name: stack.worker_command(processes=1, threads=8) for name in ("worker-1", "worker-2")}
    # The working folder holds no `.env`: the demo runs with its own settings.
    return {name: Process(name, command, environment, write, cwd=folder) for name, command in commands.items()}


def _stop(processes: Mapping[str, Process]) -> None:
    try:
        stop_all(processes.values())
    finally:
        for process in processes.values():
            process.kill()


async def _until_ready(made: Stage) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT
    async with httpx.AsyncClient(trust_env=False) as client:
        while time.monotonic() < deadline:
            made.check()
            with suppress(httpx.HTTPError):
                if (await client.get(f"{made.url}/health/ready")).is_success and await _workers_wait(made):
                    return
            await asyncio.sleep(0.1)
    raise ServerError(f"the processes were not ready within {_READY_TIMEOUT:.0f} s")


async def _workers_wait(made: Stage) -> bool:
    """Whether relays and workers are connected."""
    logs = [made.folder / f"worker-{number}.log" for number in (1, 2)]
    booted = all(log.exists() and "ready for action" in log.read_text() for log in logs)
    relays = (
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE split_part(application_name, ' ', 1) = 'outbox-relay' AND datname = current_database()"
    )
    return booted and await made.count(relays) >= 2


def _last_line(log: Path) -> str:
    with suppress(OSError, IndexError):
        return log.read_text().strip().splitlines()[-1]
    return f"see {sys.executable} -m service.dev dev"
