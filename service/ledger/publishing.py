"""Writing deliveries, and the keys of events from elsewhere, in the caller's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert

from service.ledger.tables import AcceptedEvent, OutboxMessage

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Connection, Table
    from sqlalchemy.ext.asyncio import AsyncSession

_INSERT = insert(cast("Table", OutboxMessage.__table__))


def insert_deliveries(connection: Connection, rows: list[dict[str, Any]], delay: timedelta | None) -> None:
    """Write deliveries that are due after `delay`, by the database's clock; at once if it is `None`."""
    connection.execute(_INSERT.values(_due(delay)) if delay else _INSERT, rows)


def as_objects(rows: Iterable[dict[str, Any]], delay: timedelta | None) -> list[OutboxMessage]:
    """The same for a session that writes objects only."""
    return [OutboxMessage(**row, **_due(delay)) for row in rows]


def _due(delay: timedelta | None) -> dict[str, Any]:
    return {"due_at": func.clock_timestamp() + delay} if delay else {}


async def take_key(session: AsyncSession, key: str, event_id: UUID) -> bool:
    """Note that the event of this key was accepted; whether it was new."""
    # ON CONFLICT waits for a transaction that holds the same key, then sees whether it committed.
    statement = insert(AcceptedEvent).values(key=key, event_id=event_id)
    new = await session.scalar(statement.on_conflict_do_nothing().returning(AcceptedEvent.event_id))
    return new is not None
