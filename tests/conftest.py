"""Fixtures on real servers, which are this run's own: never the developer's database, whatever the environment says.

Whatever a test starts ends with it (`tests/servers/leftovers.py`); a test that leaves something running has failed.

Two kinds of database: `database_url` is a copy of the migrated template, for whatever needs real commits, processes or
more than one connection; `rolled_back_session` is a transaction that is rolled back, for tests of a domain's logic.
"""

from __future__ import annotations

import gc
import itertools
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from service.database.engine import create_engine
from service.database.sessions import SessionFactory, session_factory
from service.dev.issuer import DevIssuer, every_scope
from service.dev.postgres import Postgres, psql
from service.dev.valkey import Valkey
from service.settings import BrokerSettings, DatabaseSettings, IdentitySettings, OutboxSettings, Settings
from tests.servers.leftovers import Leftovers
from tests.servers.real_servers import TEMPLATE, RealServers, Where, another_postgres, outside_environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

CLOCK = {
    "redispatch_after": "2",
    "lease": "2",
    "grace": "1",
    "min_backoff": "50",
    "max_backoff": "500",
    "time_limit": "5000",
    "shutdown_grace": "3",
}
"""The settings of `OutboxSettings` that tests shorten, as environment variables have them."""

DOMAIN_SETTINGS: dict[str, str] = {}
"""What the settings that domains add are in every test, by variable."""

_patch = pytest.MonkeyPatch()
_servers = RealServers()
_where: Where | None = None
_serial = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Take the developer's settings away, from this process and its children."""
    for key in os.environ.keys() - outside_environment().keys():
        _patch.delenv(key)
    _patch.setenv("ENV_FILE", "")
    for key, value in DOMAIN_SETTINGS.items():
        _patch.setenv(key, value)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # In a shell's background; the commands that a test interrupts would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(Leftovers())


def pytest_collection_finish() -> None:
    """Spare the garbage collector what stays until the end anyway; it is a tenth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Stop what this process started, and give the settings back."""
    _servers.stop()
    _patch.undo()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of xdist where the servers are."""
    node.workerinput["servers"] = asdict(_start_once())


def _start_once() -> Where:
    global _where
    if _where is None:
        _where = _servers.start()
    return _where


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Where:
    """Where this run's PostgreSQL and Valkey are."""
    given = getattr(request.config, "workerinput", None)
    return Where(**given["servers"]) if given is not None else _start_once()


def _create_database(servers: Where) -> Iterator[str]:
    name = f"test_{os.getpid()}_{next(_serial)}"
    psql(servers.postgres, f'CREATE DATABASE "{name}" TEMPLATE "{TEMPLATE}" STRATEGY FILE_COPY')
    yield servers.postgres.replace("/postgres?", f"/{name}?")
    psql(servers.postgres, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.fixture
def database_url(servers: Where) -> Iterator[str]:
    """A migrated, empty database of this test's own, as postgresql:// URL."""
    yield from _create_database(servers)


@pytest.fixture(scope="session")
def worker_database_url(servers: Where) -> Iterator[str]:
    """A migrated database that the tests of this process share; only `rolled_back_session` uses it."""
    yield from _create_database(servers)


@pytest.fixture
def broker_url(servers: Where) -> str:
    """The Valkey that all tests share: stay within `broker_namespace`, and take `own_valkey` to flush or kill it."""
    return servers.valkey


@pytest.fixture
def broker_namespace(broker_url: str) -> Iterator[str]:
    """A prefix for this test's keys in Valkey, which are removed after it."""
    namespace = f"test-{uuid4().hex[:12]}"
    yield namespace
    with redis.Redis.from_url(broker_url) as client:
        for key in client.scan_iter(match=f"{namespace}*", count=1000):
            client.delete(key)


@pytest.fixture(scope="session")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> DevIssuer:
    """Who signs the tokens that the API believes."""
    return DevIssuer(tmp_path_factory.mktemp("issuer"))


@pytest.fixture
def authorized(issuer: DevIssuer) -> Callable[..., dict[str, str]]:
    """The headers of a caller: `authorized("bob")`, with all scopes or with those that are named after it."""

    def headers(subject: str, *scopes: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {issuer.token(subject, scopes or every_scope())}"}

    return headers


@pytest.fixture
def environment(database_url: str, broker_url: str, broker_namespace: str, issuer: DevIssuer) -> dict[str, str]:
    """The environment for a process of the service, with the same settings as `settings`."""
    return outside_environment() | issuer.variables | _variables(database_url, broker_url, broker_namespace)


def _variables(database_url: str, broker_url: str, namespace: str) -> dict[str, str]:
    clock = {f"OUTBOX__{key.upper()}": value for key, value in CLOCK.items()}
    urls = {"DATABASE__URL": database_url, "BROKER__URL": broker_url, "BROKER__NAMESPACE": namespace}
    return clock | urls | {"PYTHONUNBUFFERED": "1"}


@pytest.fixture
def settings(database_url: str, broker_url: str, broker_namespace: str, issuer: DevIssuer) -> Settings:
    """Settings with short clocks, for this test's database and namespace."""
    return Settings(
        database=DatabaseSettings(url=SecretStr(database_url), pool_size=5),
        broker=BrokerSettings(url=SecretStr(broker_url), namespace=broker_namespace),
        outbox=OutboxSettings.model_validate(CLOCK),
        identity=IdentitySettings.model_validate(issuer.settings),
    )


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """An engine on this test's database."""
    engine = create_engine(settings.database, application_name="tests")
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> SessionFactory:
    """Sessions on this test's database; what they commit is visible to other connections."""
    return session_factory(engine)


@pytest.fixture
async def rolled_back_session(worker_database_url: str) -> AsyncIterator[AsyncSession]:
    """A session whose commits are savepoints of a transaction that is rolled back after the test."""
    engine = create_engine(DatabaseSettings(url=SecretStr(worker_database_url)), application_name="tests")
    async with engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(
            connection, expire_on_commit=False, join_transaction_mode="create_savepoint"
        ) as session:
            yield session
        await outer.rollback()
    await engine.dispose()


@pytest.fixture
def server_folder(servers: Where) -> Path:
    """A new folder that embedded servers can use, unlike `tmp_path`, which is closed to PostgreSQL's account."""
    folder = Path(servers.folder) / f"own-{os.getpid()}-{next(_serial)}"
    folder.mkdir()
    folder.chmod(0o711)
    return folder


@pytest.fixture
def own_postgres(servers: Where, server_folder: Path) -> Iterator[Postgres]:
    """A PostgreSQL of this test's own, running, to kill, stop or fill: `own_postgres.url("service")` is migrated."""
    with another_postgres(servers, server_folder / "postgres") as postgres:
        yield postgres


@pytest.fixture
def own_valkey(server_folder: Path) -> Iterator[Valkey]:
    """A Valkey of this test's own, running, to flush, kill or stop."""
    with Valkey(server_folder / "valkey") as valkey:
        yield valkey
