"""The newest events, found without an index of their own.

Ids are in the order of time, and those of an event's deliveries follow its own: so both tables are walked backwards
along their ids, a page at a time, until enough was found.

What must stay true: however much the ledger holds and however rare what is looked for, no more than a bounded number of
deliveries are looked at, and whoever asked is told when that was not everything.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from service.ledger.ids import first_id_after, last_delivery_of, made_at
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from service.database.driver import Connection

STATES = ("pending", "dispatched", "running", "completed", "dead")
"""States a delivery can be listed by; one that was replayed or discarded is no longer dead."""

BOUND = 100_000
"""Deliveries looked at for one question, unless it says otherwise."""

PAGE = 2_000
"""Deliveries looked at in one statement."""

HOLDS = """
EXISTS (SELECT FROM jsonb_path_query(payload, '$.**') AS part
        WHERE jsonb_typeof(part) IN ('string', 'number') AND lower(part #>> '{{}}') = ANY ({values}))
"""
"""SQL: the payload has one of these values, in lower case, as all of a string or a number in it, at any depth."""

# A delivery that died twice has two dead letters under one id: WITH TIES keeps them on one page.
_PAGE = """
WITH page AS MATERIALIZED (
    SELECT * FROM (
        (SELECT id, event_id, event_type, consumer, state, headers<payload> FROM outbox_message
         WHERE id >= $1 AND id < $2 ORDER BY id DESC LIMIT $3)
        UNION ALL
        (SELECT message_id, event_id, event_type, consumer, coalesce(resolution, 'dead'), headers<payload>
         FROM dead_letter
         WHERE message_id >= $1 AND message_id < $2 ORDER BY message_id DESC FETCH FIRST $3 ROWS WITH TIES)
    ) AS delivery ORDER BY id DESC FETCH FIRST $3 ROWS WITH TIES
)
SELECT (SELECT count(*) FROM page) AS looked,
       (SELECT id FROM page ORDER BY id LIMIT 1) AS last,
       ARRAY(SELECT DISTINCT event_id FROM page
             WHERE ($4::text IS NULL OR event_type = $4)
               AND ($5::text IS NULL OR consumer = $5)
               AND ($6::text IS NULL OR headers ->> 'correlation_id' = $6)
               AND ($7::text[] IS NULL OR state = ANY ($7))
               AND ($8::text IS NULL OR <holds>)
             ORDER BY event_id DESC) AS events
"""
# Who may not read payloads asks for none.
_WITHOUT_PAYLOAD = _PAGE.replace("<payload>", "").replace("<holds>", "false")
_WITH_PAYLOAD = _PAGE.replace("<payload>", ", payload").replace("<holds>", HOLDS.format(values="ARRAY[lower($8)]"))
_DELIVERIES = """
SELECT delivery.*, clock_timestamp() - created_at AS age
FROM unnest($1::uuid[], $2::uuid[]) AS event (first, last) CROSS JOIN LATERAL (
    SELECT id, event_id, event_type, consumer, coalesce(ended_as, state) AS state, created_at,
           headers ->> 'correlation_id' AS correlation_id
    FROM outbox_message WHERE id > event.first AND id <= event.last
    UNION ALL
    SELECT message_id, event_id, event_type, consumer, coalesce(resolution, 'dead'), created_at,
           headers ->> 'correlation_id'
    FROM dead_letter
    WHERE message_id > event.first AND message_id <= event.last AND resolution IS DISTINCT FROM 'replayed'
) AS delivery ORDER BY event_id DESC, id
"""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Events with a delivery like this; what is `None` does not narrow it."""

    event_type: str | None = None
    consumer: str | None = None
    correlation_id: str | None = None
    states: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None
    value: str | None = None
    """Is in the payload; it takes the right to read them."""


@dataclass(frozen=True, slots=True)
class Found:
    """The ids of the newest events that match, the newest first.

    Attributes:
        more: The walk ended because there were enough of them.
        bounded: It ended because it had looked at too many deliveries, or for too long.
        reached: Until here it came, if it is `bounded`: who goes on has this as `until`.
    """

    event_ids: list[UUID]
    looked_at: int
    more: bool
    bounded: bool
    reached: datetime | None


@dataclass(frozen=True, slots=True)
class Delivered:
    """One consumer's part."""

    delivery_id: UUID
    consumer: str
    state: str


@dataclass(frozen=True, slots=True)
class ListedEvent:
    """An event with the deliveries that are in the ledger or dead."""

    event_id: UUID
    event_type: str
    published_at: datetime
    age: timedelta
    correlation_id: str | None
    deliveries: list[Delivered] = field(default_factory=list)


async def find(
    connection: Connection, wanted: EventFilter, limit: int, bound: int | None = None, seconds: float = math.inf
) -> Found:
    """The newest `limit` events that match, among the newest `bound` (`BOUND`) deliveries of that time.

    After so many seconds it looks at no further page of them.
    """
    first = first_id_after(wanted.since) if wanted.since else UUID(int=0)
    cursor = first_id_after(wanted.until) if wanted.until else UUID(int=2**128 - 1)
    # What is stored was cleaned, so what is looked for is cleaned alike.
    texts = (wanted.event_type, wanted.consumer, wanted.correlation_id, wanted.value)
    *cleaned, value = [None if each is None else storable(each) for each in texts]
    statement = _WITHOUT_PAYLOAD if value is None else _WITH_PAYLOAD
    ends = time.monotonic() + seconds
    bound = BOUND if bound is None else bound
    found: dict[UUID, None] = {}
    looked, ended = 0, False
    while not ended and len(found) < limit and looked < bound and (not looked or time.monotonic() < ends):
        size = min(PAGE, bound - looked)
        page = await connection.fetchrow(statement, first, cursor, size, *cleaned, wanted.states, value)
        assert page is not None
        found |= dict.fromkeys(page["events"])
        looked += page["looked"]
        ended, cursor = page["looked"] < size, page["last"]
    enough = len(found) >= limit
    more = len(found) > limit or (enough and not ended)
    bounded = not ended and not enough
    # One that was made in the same millisecond may not have been looked at.
    reached = made_at(cursor) + timedelta(milliseconds=1) if bounded else None
    return Found(list(found)[:limit], looked, more, bounded, reached)


async def load(connection: Connection, event_ids: Sequence[UUID]) -> list[ListedEvent]:
    """These events with their deliveries, the newest first."""
    last = [last_delivery_of(each) for each in event_ids]
    events: dict[UUID, ListedEvent] = {}
    for row in await connection.fetch(_DELIVERIES, list(event_ids), last):
        event = events.setdefault(
            row["event_id"],
            ListedEvent(row["event_id"], row["event_type"], row["created_at"], row["age"], row["correlation_id"]),
        )
        event.deliveries.append(Delivered(row["id"], row["consumer"], row["state"]))
    return list(events.values())
