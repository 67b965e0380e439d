"""Pausing queues: a row in `paused_queue`, which every relay honours within a second.

Each change is recorded in the same transaction (`operations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.ledger import operations
from service.text import storable

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from service.database.driver import Connection

EVERY_QUEUE = "*"
"""The name under which all queues are paused at once."""

# A sleeping relay is woken to see the change.
_PAUSE = """
INSERT INTO paused_queue (queue, paused_by, why) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING outbox_wake()
"""
_RESUME = "DELETE FROM paused_queue WHERE queue = $1 RETURNING outbox_wake()"
_PAUSED = (
    "SELECT queue, paused_at, clock_timestamp() - paused_at AS age, paused_by, why FROM paused_queue ORDER BY queue"
)


@dataclass(frozen=True, slots=True)
class Pause:
    """A paused queue, or with `EVERY_QUEUE` all of them."""

    queue: str
    paused_at: datetime
    age: timedelta
    paused_by: str
    why: str | None


async def pause(connection: Connection, queue: str, *, by: str, why: str | None) -> bool:
    """Pause a queue; whether it was not paused before."""
    words = storable(by), None if why is None else storable(why)
    async with connection.transaction():
        changed = await connection.fetchrow(_PAUSE, queue, *words) is not None
        if changed:
            await operations.record(connection, "pause", {"queue": queue}, by=by, why=why)
    return changed


async def resume(connection: Connection, queue: str, *, by: str, why: str | None) -> bool:
    """Undo a pause under this very name; whether there was one."""
    async with connection.transaction():
        changed = await connection.fetchrow(_RESUME, queue) is not None
        if changed:
            await operations.record(connection, "resume", {"queue": queue}, by=by, why=why)
    return changed


async def paused_queues(connection: Connection) -> list[Pause]:
    """Every pause, by name."""
    return [Pause(**row) for row in await connection.fetch(_PAUSED)]
