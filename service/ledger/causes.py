"""What caused an event, and what it caused: the tree of events that one request set off, as far as it is kept.

A consumer's events carry the ID of the delivery that published them. Causes are found by that ID; for effects there is
no index, so they are looked for among what was published next. What must stay true: no more than `BOUND` deliveries are
looked at, and whoever asked is told when that was not everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from service.ledger.ids import event_of, last_delivery_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from service.database.driver import Connection

BOUND = 20_000
"""Deliveries looked at for one event's effects."""

DEEPEST = 20
"""Causes that are followed back."""

_ONE = """
SELECT event_id, event_type, created_at, headers ->> 'causation_id' AS cause FROM outbox_message
WHERE id > $1 AND id <= $2
UNION ALL
SELECT event_id, event_type, created_at, headers ->> 'causation_id' FROM dead_letter
WHERE message_id > $1 AND message_id <= $2
LIMIT 1
"""
_LATER = """
WITH looked AS MATERIALIZED (
    (SELECT id, event_id, event_type, created_at, headers FROM outbox_message WHERE id > $1 ORDER BY id LIMIT $3)
    UNION ALL
    (SELECT message_id, event_id, event_type, created_at, headers FROM dead_letter
     WHERE message_id > $1 ORDER BY message_id LIMIT $3)
), found AS (
    SELECT DISTINCT ON (event_id) event_id, event_type, created_at, headers ->> 'causation_id' AS cause
    FROM looked WHERE headers ->> 'correlation_id' = $2 ORDER BY event_id LIMIT 200
)
SELECT bounded.looked_at, found.* FROM (SELECT count(*) AS looked_at FROM looked) AS bounded LEFT JOIN found ON true
"""


@dataclass(frozen=True, slots=True)
class Relative:
    """An event of the tree; `cause` is the delivery that published it, if one did."""

    event_id: UUID
    event_type: str
    published_at: datetime
    cause: UUID | None


@dataclass(frozen=True, slots=True)
class Family:
    """What led to an event, the first cause first, and what came of it, the parents before their children.

    Attributes:
        lost: Whether a cause is no longer kept.
        bounded: Whether more was published since than was looked at.
    """

    causes: list[Relative]
    effects: list[tuple[int, Relative]]
    lost: bool
    bounded: bool


async def family(connection: Connection, event_id: UUID, headers: dict[str, str]) -> Family:
    """The causes and effects of the event with these headers; each effect with its distance from it, from 1."""
    causes, lost = await _causes(connection, _uuid(headers.get("causation_id")))
    rows = await connection.fetch(_LATER, last_delivery_of(event_id), headers.get("correlation_id"), BOUND)
    later = [
        Relative(row["event_id"], row["event_type"], row["created_at"], _uuid(row["cause"]))
        for row in rows
        if row["event_id"] is not None
    ]
    return Family(causes, list(_effects(event_id, later, 1)), lost, bounded=rows[0]["looked_at"] >= BOUND)


async def _causes(connection: Connection, delivery_id: UUID | None) -> tuple[list[Relative], bool]:
    causes: list[Relative] = []
    while delivery_id is not None and len(causes) < DEEPEST:
        event_id = event_of(delivery_id)
        row = await connection.fetchrow(_ONE, event_id, last_delivery_of(event_id))
        if row is None:
            return causes, True
        delivery_id = _uuid(row["cause"])
        causes.insert(0, Relative(event_id, row["event_type"], row["created_at"], delivery_id))
    return causes, False


def _effects(event_id: UUID, later: list[Relative], distance: int) -> Iterator[tuple[int, Relative]]:
    """Nothing is published before its cause, so what comes later in time is all that can be below."""
    for number, each in enumerate(later):
        if each.cause is not None and event_of(each.cause) == event_id:
            yield distance, each
            yield from _effects(each.event_id, later[number + 1 :], distance + 1)


def _uuid(text: str | None) -> UUID | None:
    try:
        return None if text is None else UUID(text)
    except ValueError:
        return None
