"""A ledger with lanes, and one worker that runs whatever is due."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from service.database.sessions import transaction
from service.outbox import publish
from tests.proof.lanes import domain
from tests.proof.ledger.conftest import Ledger, connect, connection, processes, runner, worker_engine

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    import asyncpg

    from service.database.driver import Connection
    from service.database.sessions import SessionFactory
    from service.outbox import Event
    from service.outbox.running.runner import Runner

__all__ = ["Lanes", "connect", "connection", "processes", "runner", "worker_engine"]

_DUE = "SELECT id FROM outbox_message WHERE state = 'pending' AND due_at <= clock_timestamp() ORDER BY due_at LIMIT 1"
_UNPARKED = """
SELECT lane, payload ->> 'note' AS note FROM outbox_message
WHERE state <> 'completed' AND due_at < outbox_parked() AND lane IS NOT NULL ORDER BY position
"""


class Lanes(Ledger):
    """The test's own view of the ledger, and what a worker has done."""

    def __init__(self, connection: Connection, sessions: SessionFactory, runner: Runner) -> None:
        super().__init__(connection, sessions)
        self.runner = runner

    async def publish_all(self, events: Iterable[Event]) -> None:
        """Each in a transaction of its own."""
        for event in events:
            async with transaction(self.sessions) as session:
                publish(session, event)

    async def run(self, most: int = 1000) -> None:
        """Run what is due, one after the other, until nothing is."""
        for _ in range(most):
            due: UUID | None = await self.connection.fetchval(_DUE)
            if due is None:
                return
            await self.runner.deliver(due)

    async def unparked(self) -> list[str]:
        """The notes of those in lanes whose turn it is."""
        return [row["note"] for row in await self.connection.fetch(_UNPARKED)]

    async def steps(self, lane: str) -> str:
        """The notes of what has taken effect, in order."""
        rows = await self.connection.fetch("SELECT note FROM step WHERE lane = $1 ORDER BY number", lane)
        return "".join(row["note"] for row in rows)

    async def delivery(self, note: str) -> asyncpg.Record:
        """The row of an event."""
        row = await self.connection.fetchrow("SELECT * FROM outbox_message WHERE payload ->> 'note' = $1", note)
        assert row is not None
        return row

    async def letter(self) -> asyncpg.Record:
        """The one open dead letter."""
        row = await self.connection.fetchrow("SELECT * FROM dead_letter WHERE resolution IS NULL")
        assert row is not None
        return row

    async def sql(self, statement: str, *values: Any) -> None:
        await self.connection.execute(statement, *values)


@pytest.fixture
async def lanes(connection: Connection, sessions: SessionFactory, runner: Runner) -> Lanes:
    """The ledger with the effects' table."""
    await connection.execute(domain.SCHEMA)
    return Lanes(connection, sessions, runner)
