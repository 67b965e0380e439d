"""What a worker loses while people look at the console."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import httpx

from service.dev.servers import free_port
from tests.proof.bench.effects import fill, rate
from tests.proof.bench.stage import INSERT
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.proof.bench.stage import Stage

__all__ = ["effects_beside"]

_EVERY = 3.0
"""Seconds between two looks of a page, as `templates/overview.html` has it."""


async def effects_beside(stage: Stage, count: int, pages: int) -> float:
    """Effects per second of one worker process, beside so many open pages of a console."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(stage.database())
        connection = await asyncpg.connect(database)
        stack.push_async_callback(connection.close)
        await fill(stage, database, connection, INSERT, count)
        if pages:
            await stack.enter_async_context(_open(stage, database, pages))
        async with stage.worker(database):
            return await rate(connection, count)


@asynccontextmanager
async def _open(stage: Stage, database: str, pages: int) -> AsyncIterator[None]:
    """A console with its overview open in so many browsers."""
    port, secret = free_port(), secrets.token_hex(20)
    settings = {"CONSOLE__PORT": str(port), "CONSOLE__PROXY": "127.0.0.1", "CONSOLE__SECRET": secret}
    caller = {"X-Console-Secret": secret, "X-Forwarded-User": "ann", "X-Forwarded-Groups": "viewer"}
    environment = stage.environment(database, **settings)
    async with (
        stage.running("service.console", environment=environment, ready=None),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=caller, timeout=30) as browser,
    ):

        async def shown() -> bool:
            with suppress(httpx.TransportError):
                return (await browser.get("/")).is_success
            return False

        async def look() -> None:
            while True:
                (await browser.get("/")).raise_for_status()
                await asyncio.sleep(_EVERY)

        await until(shown)
        looks = [asyncio.create_task(look()) for _ in range(pages)]
        try:
            yield
            assert not any(each.done() for each in looks)
        finally:
            for each in looks:
                each.cancel()
            await asyncio.wait(looks)
