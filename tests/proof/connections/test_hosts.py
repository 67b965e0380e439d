"""Of several hosts in `DATABASE__URL`, one that says nothing takes only its own share of the time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import asyncpg
import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url

from service.database.driver import open_connection
from service.database.engine import create_engine
from service.settings import DatabaseSettings
from tests.servers.proxy import proxy, socket_of
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.settings import Settings

_TIMEOUT = 8


class Silent:
    """Takes connections and says nothing."""

    def __init__(self) -> None:
        self.taken = 0
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    def accept(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        self._writers.append(writer)

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
async def silent() -> AsyncIterator[Silent]:
    """A host that is there and says nothing."""
    opened = Silent()
    server = await asyncio.start_server(opened.accept, "127.0.0.1", 0)
    opened.port = server.sockets[0].getsockname()[1]
    yield opened
    server.close()
    opened.close()


@asynccontextmanager
async def _behind(settings: Settings, silent: Silent) -> AsyncIterator[DatabaseSettings]:
    database = make_url(settings.database.dsn).database
    async with proxy(socket_of(settings.database.dsn)) as between:
        hosts = f"127.0.0.1:{silent.port},127.0.0.1:{between.port}"
        url = f"postgresql://postgres@{hosts}/{database}?sslmode=disable"
        yield DatabaseSettings(url=SecretStr(url), connect_timeout=_TIMEOUT)


@pytest.mark.slow
async def test_the_next_one_is_reached_and_remembered(settings: Settings, silent: Silent) -> None:
    async with _behind(settings, silent) as database:
        for _ in range(2):
            await (await open_connection(database, "tests")).close()
        engine = create_engine(database, application_name="tests")
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        await engine.dispose()
    assert silent.taken == 1


async def test_whoever_gave_up_while_it_said_nothing_begins_with_the_next(settings: Settings, silent: Silent) -> None:
    """A probe waits for less time than a host's share; it would never get through."""
    async with _behind(settings, silent) as database:
        probe = asyncio.create_task(open_connection(database, "tests"))
        await until(lambda: silent.taken == 1)
        probe.cancel()
        with suppress(asyncio.CancelledError):
            await probe
        await (await open_connection(database, "tests")).close()
    assert silent.taken == 1


@pytest.mark.slow
async def test_when_none_will_do_all_were_asked_within_the_time(silent: Silent) -> None:
    other = Silent()
    server = await asyncio.start_server(other.accept, "127.0.0.1", 0)
    hosts = f"127.0.0.1:{silent.port},127.0.0.1:{server.sockets[0].getsockname()[1]}"
    database = DatabaseSettings(url=SecretStr(f"postgresql://u@{hosts}/d"), connect_timeout=2)
    with pytest.raises(TimeoutError):
        await open_connection(database, "tests")
    assert (silent.taken, other.taken) == (1, 1)
    server.close()
    other.close()


async def test_a_password_that_is_refused_is_tried_nowhere_else(silent: Silent, settings: Settings) -> None:
    name = make_url(settings.database.dsn).database
    async with proxy(socket_of(settings.database.dsn)) as between:
        hosts = f"127.0.0.1:{between.port},127.0.0.1:{silent.port}"
        database = DatabaseSettings(url=SecretStr(f"postgresql://nobody@{hosts}/{name}?sslmode=disable"))
        with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
            await open_connection(database, "tests")
    assert silent.taken == 0
