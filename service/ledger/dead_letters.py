"""What died for good: finding it, by number, by delivery, or by what they have in common.

A worker decides what dies: `outbox/running/runner.py`. A dead letter here is a dictionary of its columns, with its
`age`. The connection is one that reads JSON (`driver.read_json`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from service.text import storable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from datetime import datetime

    from service.database.driver import Connection

_PAGE = 200
"""Dead letters that are in memory at a time."""

_WHERE = {
    "open": "WHERE resolution IS NULL",
    "replayed": "WHERE resolution = 'replayed'",
    "discarded": "WHERE resolution = 'discarded'",
    "edited": "WHERE resolution = 'edited'",
    "any": "WHERE true",
}
STATES = tuple(_WHERE)
"""States a dead letter can be listed by."""

FILTER = """
  AND ($1::text IS NULL OR consumer = $1)
  AND ($2::text IS NULL OR event_type = $2)
  AND ($3::text IS NULL OR queue = $3)
  AND ($4::timestamptz IS NULL OR died_at >= $4)
  AND ($5::timestamptz IS NULL OR died_at < $5)
  AND ($6::text IS NULL OR strpos(lower(reason), lower($6)) > 0 OR EXISTS (
        SELECT FROM jsonb_array_elements(errors) AS error
        WHERE strpos(lower(concat_ws(': ', error ->> 'type', error ->> 'message')), lower($6)) > 0))
"""
"""What narrows to the wanted ones, after a WHERE; takes `arguments`."""

_IDS = "SELECT id FROM dead_letter {where} {filter} ORDER BY id LIMIT $7"
_LATEST = "SELECT id FROM dead_letter {where} {filter} ORDER BY died_at DESC, id DESC LIMIT $7"
_ROWS = """
SELECT {columns}, clock_timestamp() - died_at AS age FROM dead_letter WHERE id = ANY($1) ORDER BY died_at DESC, id DESC
"""
_COUNT = "SELECT count(*) FROM dead_letter {where} {filter}"
_OVERVIEW = """
SELECT consumer, event_type, reason, errors -> -1 ->> 'type' AS error, count(*) AS count
FROM dead_letter WHERE id = ANY($1)
GROUP BY consumer, event_type, reason, error ORDER BY count(*) DESC, consumer, reason
"""

# `held`: how many wait in the lane that it blocks.
_ONE = """
SELECT {columns}, clock_timestamp() - died_at AS age,
       (SELECT count(*) FROM outbox_message AS held
        WHERE held.lane = dead_letter.lane AND held.position > dead_letter.position AND blocks
          AND resolution IS NULL AND held.state <> 'completed') AS held
FROM dead_letter
"""
_BY_NUMBER = _ONE + "WHERE id = $1"
_BY_DELIVERY = _ONE + "WHERE message_id = $1 ORDER BY resolution IS NULL DESC, id DESC"

MASKED = """
id, message_id, event_id, event_type, version, consumer, queue, headers, attempts, dispatches, created_at, errors,
reason, died_at, resolution, resolved_at, resolved_by, resolved_why, resolved_role, lane, position, blocks
"""
"""All columns but the payload, for whom may not see it: PostgreSQL refuses their role the whole of a row."""


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which dead letters are meant; what is `None` does not narrow it."""

    consumer: str | None = None
    event_type: str | None = None
    queue: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    error: str | None = None
    state: str = "open"

    @property
    def about(self) -> dict[str, Any]:
        """What narrows it, by name: for the record of what was done with it."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "state"}


async def find(connection: Connection, wanted: LetterFilter, limit: int) -> tuple[int, list[int]]:
    """How many dead letters there are, and the ids of the latest `limit` of them."""
    given = arguments(wanted)
    total = await connection.fetchval(_sql(_COUNT, wanted), *given)
    rows = await connection.fetch(_sql(_LATEST, wanted), *given, limit)
    return total, [row["id"] for row in rows]


async def load(connection: Connection, ids: Sequence[int], columns: str = "*") -> AsyncIterator[dict[str, Any]]:
    """These dead letters, the latest first; with `MASKED` columns without their payloads.

    However many they are and however slowly they are read, little is in memory and no transaction is open meanwhile.
    """
    statement = _ROWS.format(columns=columns)
    for begin in range(0, len(ids), _PAGE):
        for row in await connection.fetch(statement, ids[begin : begin + _PAGE]):
            yield dict(row)


async def find_ids(connection: Connection, wanted: LetterFilter, limit: int) -> list[int]:
    """The ids of the oldest `limit` of them, oldest first."""
    rows = await connection.fetch(_sql(_IDS, wanted), *arguments(wanted), limit)
    return [row["id"] for row in rows]


def _sql(template: str, wanted: LetterFilter) -> str:
    return template.format(where=_WHERE[wanted.state], filter=FILTER)


def arguments(wanted: LetterFilter) -> list[Any]:
    """What `FILTER` takes, in its order."""
    # What is stored was cleaned, so what is looked for is cleaned alike.
    names = (wanted.consumer, wanted.event_type, wanted.queue, wanted.error)
    consumer, event_type, queue, error = (None if each is None else storable(each) for each in names)
    return [consumer, event_type, queue, wanted.since, wanted.until, error]


async def look_up(connection: Connection, reference: int | UUID, columns: str = "*") -> dict[str, Any] | None:
    """The dead letter of this number or delivery, of several the open or latest one; `None` if there is none."""
    if isinstance(reference, UUID):
        row = await connection.fetchrow(_BY_DELIVERY.format(columns=columns), reference)
    else:
        row = await connection.fetchrow(_BY_NUMBER.format(columns=columns), reference) if reference < 2**63 else None
    return None if row is None else dict(row)


async def overview(connection: Connection, ids: Sequence[int]) -> list[dict[str, Any]]:
    """How many there are per consumer, event type and reason: what a person confirms."""
    return [dict(row) for row in await connection.fetch(_OVERVIEW, list(ids))]
