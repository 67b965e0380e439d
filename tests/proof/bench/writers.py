"""What the outbox costs those who write: commits per second, and requests per second of the API."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg

from service.dev.servers import free_port
from tests.proof.bench.stage import INSERT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from service.database.driver import Connection
    from tests.proof.bench.stage import Running, Stage

__all__ = ["api", "commits", "post_all", "requests"]

_BUSINESS = "INSERT INTO bench_order (id, customer) VALUES ($1, 'c-123')"


@asynccontextmanager
async def _relaying(stage: Stage, database: str, *, gated: bool) -> AsyncIterator[None]:
    if gated:
        async with stage.relay(database):
            yield
    else:
        environment = stage.environment(database)
        async with stage.running("tests.proof.bench.polling", environment=environment, ready="relay.started"):
            yield


async def commits(stage: Stage, writers: int, seconds: float, *, gated: bool) -> float:
    """Commits per second of so many connections, each with an order and an outbox row; the relay drains meanwhile.

    Args:
        stage: The servers.
        writers: Connections that write all the time.
        seconds: For how long.
        gated: With the trigger and a relay that it wakes; otherwise without a trigger, and the relay polls.
    """
    async with stage.database() as database:
        connections = [await asyncpg.connect(database) for _ in range(writers)]
        try:
            if not gated:
                await connections[0].execute("ALTER TABLE outbox_message DISABLE TRIGGER outbox_wake")
            async with _relaying(stage, database, gated=gated):
                until_time = time.perf_counter() + seconds
                began = time.perf_counter()
                done = sum(await asyncio.gather(*(_write(each, until_time) for each in connections)))
                return done / (time.perf_counter() - began)
        finally:
            for each in connections:
                await each.close()


async def _write(connection: Connection, until_time: float) -> int:
    done = 0
    while time.perf_counter() < until_time:
        async with connection.transaction():
            await connection.execute(_BUSINESS, uuid4())
            await connection.execute(INSERT, 1)
        done += 1
    return done


_PROTOCOL = "service.http.protocol:BoundedProtocol"


@asynccontextmanager
async def api(stage: Stage, database: str, *, plain: bool = False) -> AsyncIterator[tuple[Running, int]]:
    """One API process, and its port: the service's, or one that has nothing of it."""
    port = free_port()
    application: tuple[str, ...] = ("tests.proof.bench.plain_api:create_app", "--factory")
    if not plain:
        application = ("tests.proof.bench.app:create_app", "--factory", "--http", _PROTOCOL)
    command = ("uvicorn", *application, "--port", str(port), "--log-level", "info")
    environment = stage.environment(database) | {"LOG_LEVEL": "WARNING", "DATABASE__POOL_SIZE": "16"}
    async with stage.running(*command, "--no-access-log", environment=environment, ready="Uvicorn running") as run:
        yield run, port


async def requests(stage: Stage, paths: Sequence[str], rounds: int, count: int) -> dict[str, list[float]]:
    """Requests per second of `POST` to each path, from 16 kept connections, in turns.

    Those that begin with `/mine` have a token, those with `/plain` go to an API that has nothing of the service.
    """
    token = stage.issuer.token("bench", ["bench"])
    figures: dict[str, list[float]] = {each: [] for each in paths}
    async with (
        stage.database() as database,
        api(stage, database) as (_, ours),
        api(stage, database, plain=True) as (_, plain),
    ):
        ports = {each: plain if each.startswith("/plain") else ours for each in paths}
        for each in paths:
            await post_all(ports[each], each, 200, token)
        for _ in range(rounds):
            for each in random.sample(paths, len(paths)):
                figures[each].append(await post_all(ports[each], each, count, token))
    return figures


async def post_all(port: int, path: str, count: int, token: str = "") -> float:
    """Requests per second of so many requests."""
    body = json.dumps({"customer": "c-123"}).encode()
    caller = f"Authorization: Bearer {token}\r\n" if path.startswith("/mine") else ""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\n{caller}"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    began = time.perf_counter()
    await asyncio.gather(*(_post(port, request, count // 16) for _ in range(16)))
    return (count // 16) * 16 / (time.perf_counter() - began)


async def _post(port: int, request: bytes, count: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for _ in range(count):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 201"), head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
