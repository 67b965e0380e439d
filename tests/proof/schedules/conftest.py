"""Fixtures of the schedules' tests: the ledger's, with what beats."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from service.database.sessions import transaction
from service.outbox import schedule
from service.outbox.schedules import definitions, ticking  # noqa: F401  registers its consumer
from tests.proof.ledger.conftest import Ledger, connection, own_broker, processes, runner, worker_engine
from tests.proof.schedules.domain import SCHEMA, Beat

if TYPE_CHECKING:
    from uuid import UUID

    import asyncpg

    from service.database.driver import Connection
    from service.database.sessions import SessionFactory

__all__ = ["Schedules", "connection", "own_broker", "processes", "runner", "worker_engine"]


class Schedules(Ledger):
    """The ledger, as schedules use it."""

    async def put(self, name: str, **options: Any) -> datetime:
        """Make a schedule in a transaction of its own."""
        async with transaction(self.sessions) as session:
            return await schedule(session, name, Beat(who=name), **options)

    async def row_of(self, name: str) -> asyncpg.Record | None:
        """The schedule's row."""
        return await self.connection.fetchrow("SELECT * FROM outbox_schedule WHERE name = $1", name)

    async def tick_of(self, name: str) -> UUID:
        """The delivery that is the schedule's next tick."""
        row = await self.row_of(name)
        assert row is not None
        tick_id: UUID = row["tick_id"]
        return tick_id

    async def ticks(self, name: str) -> list[asyncpg.Record]:
        """Every tick of a schedule that is open, by when it is due."""
        return await self.connection.fetch(
            """SELECT * FROM outbox_message WHERE consumer = 'outbox.tick' AND state <> 'completed'
                 AND payload ->> 'schedule' = $1 ORDER BY due_at""",
            name,
        )

    async def rewind(self, name: str, to: datetime) -> UUID:
        """Let the next tick be one that was due then."""
        tick_id = await self.tick_of(name)
        await self.connection.execute(
            "UPDATE outbox_schedule SET next_at = $2, anchor = least(anchor, $2) WHERE name = $1", name, to
        )
        await self.set(tick_id, due_at=to)
        return tick_id

    async def published(self, tick_id: UUID) -> list[datetime]:
        """The times of the events that this tick published."""
        rows = await self.connection.fetch(
            """SELECT (payload ->> 'scheduled_at')::timestamptz AS at FROM outbox_message
               WHERE event_type = 'schedules.beat' AND headers ->> 'causation_id' = $1::uuid::text ORDER BY id""",
            tick_id,
        )
        return [row["at"].astimezone(UTC) for row in rows]

    async def now(self) -> datetime:
        """By PostgreSQL's clock."""
        found: datetime = await self.connection.fetchval("SELECT clock_timestamp()")
        return found


@pytest.fixture
async def ledger(connection: Connection, sessions: SessionFactory) -> Schedules:
    """The ledger with the beats' table."""
    await connection.execute(SCHEMA)
    return Schedules(connection, sessions)


@pytest.fixture
def nothing_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process has imported, and whatever the test declares, is forgotten after it."""
    monkeypatch.setattr(definitions, "_DECLARED", {})
