"""The parameters for TLS in `DATABASE__URL` mean to every process what they mean to libpq."""

from __future__ import annotations

import asyncio
import io
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import alembic.command
import pytest
from alembic.config import Config
from alembic.util import CommandError
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.engine import make_url

from relay.cli import command
from relay.process.relay_session import Sessions
from service.database import driver
from service.database.driver import DRIVER_ERRORS
from service.database.engine import create_engine
from service.dev.places import ROOT
from service.errors import DatabaseUnavailableError
from service.outbox.running.ledger_pool import LedgerPool
from service.settings import DatabaseSettings, Settings
from tests.proof.connections.gate import Gate, gate
from tests.servers.proxy import socket_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.proof.connections.certificates import Certificates


async def _engine(settings: Settings) -> None:
    engine = create_engine(settings.database, application_name="tests")
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    finally:
        await engine.dispose()


async def _ledger_pool(settings: Settings) -> None:
    pool = LedgerPool(settings)
    await pool.open()
    try:
        async with pool() as connection:
            await connection.fetchval("SELECT 1")
    finally:
        await pool.close()


async def _heartbeat(settings: Settings) -> None:
    await (await driver.connect(settings.database, "tests")).close()


async def _relay(settings: Settings) -> None:
    await (await Sessions(settings.database).connect()).close()


async def _command(settings: Settings) -> None:
    async with command.connect(settings.database) as connection:
        await connection.fetchval("SELECT 1")


async def _alembic(settings: Settings) -> None:
    configuration = Config(str(ROOT / "alembic.ini"))
    configuration.stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DATABASE__URL", settings.database.url.get_secret_value())
        environment.setenv("BROKER__URL", "redis://127.0.0.1:1/0")
        await asyncio.to_thread(alembic.command.current, configuration)


WAYS = {
    "engine": _engine,
    "ledger pool": _ledger_pool,
    "heartbeat": _heartbeat,
    "relay": _relay,
    "command": _command,
}
_FAILED = (*DRIVER_ERRORS, DatabaseUnavailableError, command.CommandError, CommandError)

Case = tuple[str, str, bool, bool]

CASES: list[Case] = [
    # certificate, parameters, whether it connects, and encrypted
    ("right", "sslmode=verify-full&sslrootcert={ca}", True, True),
    ("right", "sslmode=require", True, True),
    ("right", "", True, True),
    ("right", "sslmode=disable", True, False),
    ("self-signed", "sslmode=require", True, True),
    ("self-signed", "sslmode=require&sslrootcert={ca}", False, True),
    ("self-signed", "sslmode=verify-full&sslrootcert={ca}", False, True),
    ("other-host", "sslmode=verify-ca&sslrootcert={ca}", True, True),
    ("other-host", "sslmode=verify-full&sslrootcert={ca}", False, True),
    ("none", "sslmode=require", False, True),
    ("none", "sslmode=verify-full&sslrootcert={ca}", False, True),
    ("none", "sslmode=prefer", True, False),
]


@asynccontextmanager
async def _gate(url: str, certificates: Certificates, certificate: str) -> AsyncIterator[Gate]:
    context = None if certificate == "none" else certificates.server(certificate)
    path = socket_of(url)
    async with gate(lambda: asyncio.open_unix_connection(path), context, postgres=True) as opened:
        yield opened


def _through(settings: Settings, port: int, parameters: str) -> Settings:
    url = f"postgresql://postgres@127.0.0.1:{port}/{make_url(settings.database.dsn).database}?{parameters}"
    return settings.model_copy(update={"database": DatabaseSettings(url=SecretStr(url), connect_timeout=20)})


@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
async def test_every_way_to_connect(
    settings: Settings, certificates: Certificates, way: Callable[[Settings], Awaitable[None]]
) -> None:
    assert await _outcomes(settings, certificates, way, CASES) == CASES


async def test_alembic(settings: Settings, certificates: Certificates) -> None:
    some = [case for case in CASES if "verify-full" in case[1]]
    assert await _outcomes(settings, certificates, _alembic, some) == some


async def _outcomes(
    settings: Settings, certificates: Certificates, way: Callable[[Settings], Awaitable[None]], cases: list[Case]
) -> list[Case]:
    found = []
    for certificate, parameters, _, _ in cases:
        async with _gate(settings.database.dsn, certificates, certificate) as between:
            try:
                await way(_through(settings, between.port, parameters.format(ca=certificates.ca)))
                connects = True
            except _FAILED:
                connects = False
            found.append((certificate, parameters, connects, not between.plain))
    return found


async def test_other_parameters_reach_the_server(settings: Settings, certificates: Certificates) -> None:
    parameters = "application_name=shop&options=-c%20geqo%3Doff%20-c%20enable_seqscan%3Don"
    async with _gate(settings.database.dsn, certificates, "none") as between:
        told = _through(settings, between.port, parameters).database
        engine = create_engine(told, application_name="api")
        async with engine.connect() as connection:
            both = text("SELECT current_setting('application_name') || ' ' || current_setting('geqo')")
            assert await connection.scalar(both) == "api shop off"
        await engine.dispose()
        ledger = await driver.connect(told, "outbox-worker-heartbeat")
        assert await ledger.fetchval("SELECT current_setting('application_name')") == "outbox-worker-heartbeat shop"
        # What the ledger needs is not for the URL to change.
        assert await ledger.fetchval("SELECT current_setting('enable_seqscan')") == "off"
        await ledger.close()
