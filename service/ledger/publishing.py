"""Writing deliveries, and the keys of events from elsewhere, in the caller's transaction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import case, func, select, text
from sqlalchemy.dialects.postgresql import insert

from service.ledger.follow_ups import AFTER
from service.ledger.tables import WAITS_ALONE, AcceptedEvent, OutboxMessage

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Connection, Table
    from sqlalchemy.dialects.postgresql import Insert
    from sqlalchemy.ext.asyncio import AsyncSession

_TABLE = cast("Table", OutboxMessage.__table__)
_INSERT = insert(_TABLE)

ROWS = 1_000
"""Deliveries that one statement writes at most; with the largest events it is some 8 MB."""

# By columns and not by rows: PostgreSQL plans it once, and the driver sends ten values instead of thousands.
_INSERT_MANY = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, due_at,
                            expires_at, lane)
SELECT id, event_id, event_type, version, consumer, queue, payload::jsonb, headers::jsonb,
       CASE WHEN lane IS NULL THEN clock_timestamp() + coalesce($10::interval, '0') ELSE outbox_parked() END,
       clock_timestamp() + $11::interval, lane
FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::int[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[])
     AS row (id, event_id, event_type, version, consumer, queue, payload, headers, lane)
"""
_COLUMNS = ("id", "event_id", "event_type", "version", "consumer", "queue", "payload", "headers", "lane")


@dataclass(frozen=True, slots=True)
class Terms:
    """When deliveries are due and when they expire, counted from when their rows are written, by the database's clock.

    `None` means at once, and never. With `at_most`, which is for those that have a `unique_key`, each one that is
    merged into another puts that off again, until it has waited for so long.
    """

    delay: timedelta | None = None
    expires: timedelta | None = None
    at_most: timedelta | None = None

    def columns(self) -> dict[str, Any]:
        """Those that the table does not fill in by itself."""
        after = {"due_at": self.delay, "expires_at": self.expires}
        return {name: func.clock_timestamp() + span for name, span in after.items() if span}


def insert_deliveries(connection: Connection, rows: list[dict[str, Any]], terms: Terms) -> None:
    """Write deliveries. Those in a lane have a `due_at` of their own, and no delay.

    One with a `unique_key`, which is in no lane, is merged into one of that key which no worker has begun.
    """
    columns = terms.columns()
    statement = _INSERT.values(columns) if columns else _INSERT
    if "unique_key" in rows[0]:
        statement = _merging(statement, terms)
    in_order = [row for row in rows if "lane" in row]
    for some in ([row for row in rows if "lane" not in row] if in_order else rows, in_order):
        if some:
            connection.execute(statement, some)


def _merging(statement: Insert, terms: Terms) -> Insert:
    """It locks the one that waits, also where it changes nothing: a claim waits for this commit, and then runs with it.

    Without that lock a worker could claim it, and look at the state before this transaction, while this one relies on
    it: the last change would be lost.
    """
    waiting, new = _TABLE.c, statement.excluded
    due = func.least(waiting.due_at, new.due_at)
    if terms.at_most:
        due = func.greatest(waiting.due_at, func.least(new.due_at, waiting.created_at + terms.at_most))
    return statement.on_conflict_do_update(
        index_elements=[waiting.consumer, waiting.unique_key],
        index_where=text(WAITS_ALONE),
        # What is handed over already is with a worker at any moment; then `due_at` is when it is handed over again.
        set_={"due_at": case((waiting.state == "pending", due), else_=waiting.due_at)},
    )


def insert_many(connection: Connection, rows: list[dict[str, Any]], terms: Terms) -> None:
    """The same for any number of them, `ROWS` at a time."""
    for start in range(0, len(rows), ROWS):
        some = rows[start : start + ROWS]
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in some] for name in _COLUMNS}
        columns["payload"] = [json.dumps(each) for each in columns["payload"]]
        columns["headers"] = [json.dumps(each) for each in columns["headers"]]
        connection.exec_driver_sql(_INSERT_MANY, (*columns.values(), terms.delay, terms.expires))


def as_objects(rows: Iterable[dict[str, Any]], terms: Terms) -> list[OutboxMessage]:
    """The same for a session that writes objects only."""
    return [OutboxMessage(**(terms.columns() | row)) for row in rows]


async def has_no_order(session: AsyncSession, delivery_id: UUID) -> bool:
    """Whether SQL has published this, which is there, without saying what orders it."""
    message = OutboxMessage
    found = await session.execute(select(message.lane, message.headers.has_key(AFTER)).where(message.id == delivery_id))
    lane, follows = found.one()
    return lane is None and not follows


async def take_key(session: AsyncSession, key: str, event_id: UUID) -> bool:
    """Note that the event of this key was accepted; whether it was new."""
    # ON CONFLICT waits for a transaction that holds the same key, then sees whether it committed.
    statement = insert(AcceptedEvent).values(key=key, event_id=event_id)
    new = await session.scalar(statement.on_conflict_do_nothing().returning(AcceptedEvent.event_id))
    return new is not None
