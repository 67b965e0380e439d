"""Fixtures of the ledger's tests: events in, rows out, a runner on the test's loop and real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database.engine import create_engine
from service.database.sessions import session_factory, transaction
from service.outbox import Event, publish
from service.outbox.running.runner import Runner
from tests.proof.ledger import domain
from tests.proof.rabbitmq.node import node, rabbitmq
from tests.servers.processes import Processes

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.driver import Connection
    from service.database.sessions import SessionFactory
    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings

__all__ = ["Connect", "Ledger", "node", "rabbitmq"]


class Ledger:
    """The test's own view of the tables, on a connection of its own."""

    def __init__(self, connection: Connection, sessions: SessionFactory) -> None:
        self.connection = connection
        self.sessions = sessions

    async def publish(self, event: Event | None = None, **options: Any) -> list[UUID]:
        """Publish in a transaction of its own; the ids of the event's deliveries."""
        async with transaction(self.sessions) as session:
            event_id = publish(session, event or domain.Happened(subject_id=uuid4()), **options)
        rows = await self.connection.fetch("SELECT id FROM outbox_message WHERE event_id = $1 ORDER BY id", event_id)
        return [row["id"] for row in rows]

    async def happen(self, how: str = "", *, raw: bool = False) -> UUID:
        """Publish a `Happened`, and mark its row as handed to the broker."""
        (message_id,) = await self.publish(domain.Happened(subject_id=uuid4(), how=how, raw=raw))
        await self.set(message_id, state="dispatched", dispatches=1)
        return message_id

    async def set(self, message_id: UUID, **columns: Any) -> None:
        """Change columns of a row, behind everybody's back."""
        names = list(columns)
        assignments = ", ".join(f"{name} = ${number}" for number, name in enumerate(names, start=2))
        await self.connection.execute(
            f"UPDATE outbox_message SET {assignments} WHERE id = $1", message_id, *columns.values()
        )

    async def expire(self, message_id: UUID) -> None:
        """Let the row come due now."""
        await self.connection.execute(
            "UPDATE outbox_message SET due_at = clock_timestamp() - interval '1 second' WHERE id = $1", message_id
        )

    async def row(self, message_id: UUID) -> asyncpg.Record | None:
        """The outbox row."""
        return await self.connection.fetchrow(
            """SELECT *, extract(epoch FROM due_at - clock_timestamp())::float8 AS due_in
               FROM outbox_message WHERE id = $1""",
            message_id,
        )

    async def state(self, message_id: UUID) -> str | None:
        """The row's state, `dead` for a dead letter, `None` if there is neither."""
        row = await self.row(message_id)
        if row is not None:
            return str(row["state"])
        return "dead" if await self.dead_letter(message_id) else None

    async def dead_letter(self, message_id: UUID) -> asyncpg.Record | None:
        """The latest dead letter of a message."""
        return await self.connection.fetchrow(
            "SELECT * FROM dead_letter WHERE message_id = $1 ORDER BY id DESC LIMIT 1", message_id
        )

    async def effects(self, message_id: UUID) -> int:
        """How often the message's effect has happened."""
        return int(await self.connection.fetchval("SELECT count(*) FROM effect WHERE message_id = $1", message_id))


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A connection of the test's own."""
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


Connect = Callable[[], Awaitable["Connection"]]


@pytest.fixture(params=[False, True], ids=["session", "connection"])
def raw(request: pytest.FixtureRequest) -> bool:
    """Whether the consumer has asyncpg's connection, or a session."""
    return bool(request.param)


@pytest.fixture
async def connect(database_url: str) -> AsyncIterator[Connect]:
    """Opens further connections, for a relay or another worker that the test plays."""
    opened: list[Connection] = []

    async def open_one() -> Connection:
        opened.append(await asyncpg.connect(database_url))
        return opened[-1]

    yield open_one
    for connection in opened:
        await connection.close()


@pytest.fixture
async def ledger(connection: Connection, sessions: SessionFactory) -> Ledger:
    """The ledger with the effects' table."""
    await connection.execute(domain.SCHEMA)
    return Ledger(connection, sessions)


@pytest.fixture
def own_broker(settings: Settings, environment: dict[str, str], own_valkey: Valkey) -> Valkey:
    """A Valkey of this test's own, for relay and workers."""
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    environment["BROKER__URL"] = own_valkey.url
    return own_valkey


@pytest.fixture
async def own_ledger(settings: Settings, environment: dict[str, str], own_postgres: Postgres) -> AsyncIterator[Ledger]:
    """The ledger in a PostgreSQL of this test's own, for relay and workers."""
    url = own_postgres.url("service")
    settings.database.url = type(settings.database.url)(url)
    environment["DATABASE__URL"] = url
    engine = create_engine(settings.database, application_name="tests")
    connection = await asyncpg.connect(url)
    await connection.execute(domain.SCHEMA)
    ledger = Ledger(connection, session_factory(engine))
    yield ledger
    ledger.connection.terminate()  # a test may have replaced it
    await engine.dispose()


@pytest.fixture
async def worker_engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """The engine that the runner's deliveries use."""
    engine = create_engine(settings.database, application_name="outbox-worker")
    yield engine
    await engine.dispose()


@pytest.fixture
async def runner(settings: Settings, worker_engine: AsyncEngine) -> AsyncIterator[Runner]:
    """A worker's runner, on the test's loop."""
    runner = Runner(settings, worker_engine)
    await runner.open()
    yield runner
    await runner.close()


@pytest.fixture
async def processes(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Processes]:
    """Starts real processes with the test's settings, and ends what still runs after the test."""
    processes = Processes(environment, tmp_path)
    yield processes
    await processes.stop()
