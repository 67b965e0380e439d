"""Reads what the database says: the business tables, and what the ledger still has to do."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from tests.proof.chaos.checker import Tables

if TYPE_CHECKING:
    import asyncpg

    from service.database.driver import Connection

__all__ = ["read_tables"]

_TABLES = """
SELECT (SELECT coalesce(sum(total), 0) FROM shard)::bigint,
       (SELECT count(*) FROM outbox_message WHERE state <> 'completed'),
       (SELECT coalesce(max(attempts), 0) FROM outbox_message WHERE consumer NOT LIKE 'chaos.suffer%'),
       (SELECT count(*) FROM outbox_message WHERE dispatches >= 2)
"""

_TURNS = "SELECT key, number, saw FROM turn ORDER BY place"

# Not by the functions that are under test.
_STRANDED = """
SELECT lane FROM outbox_message WHERE state <> 'completed' AND lane IS NOT NULL
GROUP BY lane HAVING min(due_at) = '9000-01-01 00:00:00+00'
  AND NOT EXISTS (SELECT FROM dead_letter WHERE dead_letter.lane = outbox_message.lane AND resolution IS NULL)
"""

_STATES = "SELECT payload ->> 'subject_id', consumer, state FROM outbox_message"


async def read_tables(connection: Connection) -> Tables:
    """All of it, as of one moment."""
    totals = await connection.fetchrow(_TABLES)
    assert totals is not None
    return Tables(
        things=_counted(await connection.fetch("SELECT subject_id FROM thing")),
        bookings=_counted(await connection.fetch("SELECT subject_id FROM booking")),
        shard_total=totals[0],
        dead=set(_counted(await connection.fetch("SELECT payload ->> 'subject_id' FROM dead_letter"))),
        open_rows=totals[1],
        states={(row[0], row[1]): row[2] for row in await connection.fetch(_STATES)},
        attempts=totals[2],
        redispatched=totals[3],
        turns=[(row[0], row[1], row[2]) for row in await connection.fetch(_TURNS)],
        numbers={row[0]: row[1] for row in await connection.fetch("SELECT key, numbers FROM key")},
        stranded=[row[0] for row in await connection.fetch(_STRANDED)],
    )


def _counted(rows: list[asyncpg.Record]) -> Counter[str]:
    return Counter(str(row[0]) for row in rows)
