"""Dead letters by what went wrong: those of a consumer whose last error reads alike, but for what differs each time.

What must stay true: however many there are, no more than the newest `BOUND` are looked at, so that whoever looks holds
nobody up; and they are told when that was not everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.ledger.dead_letters import FILTER, arguments
from service.text import storable

if TYPE_CHECKING:
    from datetime import datetime

    from service.database.driver import Connection
    from service.ledger.dead_letters import LetterFilter

BOUND = 20_000
"""Dead letters looked at for one question."""

MOST_GROUPS = 50

# Open ones stand in an index of their own; of the others the number tells the order in which they died.
_NEWEST = {
    "open": "WHERE resolution IS NULL ORDER BY died_at DESC, id DESC",
    "replayed": "WHERE resolution = 'replayed' ORDER BY id DESC",
    "discarded": "WHERE resolution = 'discarded' ORDER BY id DESC",
    "edited": "WHERE resolution = 'edited' ORDER BY id DESC",
    "any": "ORDER BY id DESC",
}

# UUIDs, what stands between angle brackets, and numbers, hexadecimal ones too if they are long.
_DIFFERS = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}|<[^>]*>|0x[0-9a-f]+|[0-9a-f]{12,}|\d+(\.\d+)*"
_KIND = "coalesce(errors -> -1 ->> 'type', reason)"
_SHAPE = f"regexp_replace(left(coalesce(errors -> -1 ->> 'message', ''), 300), '{_DIFFERS}', '…', 'gi')"
_FINGERPRINT = f"left(md5(concat_ws(E'\\n', consumer, {_KIND}, {_SHAPE})), 12)"

_MATCHING = f"""
WITH newest AS MATERIALIZED (
    SELECT id, consumer, event_type, queue, reason, died_at, errors FROM dead_letter <newest> LIMIT {BOUND}
), matching AS MATERIALIZED (
    SELECT * FROM newest WHERE true {FILTER} AND ($7::text IS NULL OR {_FINGERPRINT} = $7)
)
"""  # noqa: S608
_LATEST = f"""
{_MATCHING}
SELECT (SELECT count(*) FROM newest) AS looked_at, (SELECT count(*) FROM matching) AS total,
       ARRAY(SELECT id FROM matching ORDER BY died_at DESC, id DESC LIMIT $8) AS ids
"""  # noqa: S608
_GROUPS = f"""
{_MATCHING}, groups AS (
    SELECT {_FINGERPRINT} AS fingerprint, consumer, {_KIND} AS kind, {_SHAPE} AS shape,
           count(*) AS count, min(died_at) AS first, max(died_at) AS last, max(id) AS example
    FROM matching GROUP BY 1, 2, 3, 4
)
SELECT * FROM groups ORDER BY count DESC, last DESC LIMIT {MOST_GROUPS}
"""  # noqa: S608


_IDS = f"{_MATCHING} SELECT id FROM matching ORDER BY id"  # noqa: S608


@dataclass(frozen=True, slots=True)
class LatestLetters:
    """The ids of the latest that match, and how many do of all that were looked at, which are `bounded` or all."""

    ids: list[int]
    total: int
    bounded: bool


@dataclass(frozen=True, slots=True)
class LetterGroup:
    """Dead letters of a consumer that died alike.

    Attributes:
        fingerprint: Names the group, for as long as the errors read the same.
        kind: The last error's type, or where there is no error the reason.
        shape: Its message, with an ellipsis for each ID and number.
        example: The newest one's number.
    """

    fingerprint: str
    consumer: str
    kind: str
    shape: str
    count: int
    first: datetime
    last: datetime
    example: int


async def latest(
    connection: Connection, wanted: LetterFilter, limit: int, fingerprint: str | None = None
) -> LatestLetters:
    """The latest `limit` of those wanted, and of this group if one is named."""
    statement = _of(_LATEST, wanted)
    cleaned = None if fingerprint is None else storable(fingerprint)
    row = await connection.fetchrow(statement, *arguments(wanted), cleaned, limit)
    assert row is not None
    return LatestLetters(row["ids"], row["total"], bounded=row["looked_at"] >= BOUND)


async def groups(connection: Connection, wanted: LetterFilter) -> list[LetterGroup]:
    """The largest groups of those wanted, the largest first."""
    statement = _of(_GROUPS, wanted)
    return [LetterGroup(**row) for row in await connection.fetch(statement, *arguments(wanted), None)]


async def find_ids(connection: Connection, wanted: LetterFilter, fingerprint: str) -> list[int]:
    """The ids of those of a group, oldest first."""
    statement = _of(_IDS, wanted)
    rows = await connection.fetch(statement, *arguments(wanted), storable(fingerprint))
    return [row["id"] for row in rows]


def _of(statement: str, wanted: LetterFilter) -> str:
    return statement.replace("<newest>", _NEWEST[wanted.state])
