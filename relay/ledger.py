"""The relay's statements: what is due, and handing it out.

What must stay true: states are literals and plans are made for the values at hand (`force_custom_plan`), or a plan
made on an empty table serves the full one; every statement is bounded in rows; leases and delays are written with
`clock_timestamp()`.

The floor: where another transaction anywhere keeps dead index entries alive, a scan from the left of the index crawls
over everything already handed out. So scans start at the last row of the one before, and a sweep without the floor
finds what committed late below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from relay.publisher import Handover

if TYPE_CHECKING:
    import asyncpg

    Connection = asyncpg.Connection[asyncpg.Record]

__all__ = ["NO_FLOOR", "Batch", "Floor", "QueueHead", "queue_heads", "recover_lost", "take_due"]


@dataclass(frozen=True, slots=True)
class Floor:
    """The position of a row in the order of hand-over."""

    due_at: datetime
    id: UUID


NO_FLOOR = Floor(datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))

# Hands out each row that is due. A row handed out again and again without being claimed waits longer each time; the
# exponent is bounded, because an interval out of range would abort the whole batch for ever. A locked row keeps its
# place in the table (ctid) until the transaction ends, so the update finds it without an index.
_TAKE = """
WITH due AS MATERIALIZED (
    SELECT ctid, id, due_at FROM outbox_message
    WHERE queue = $1 AND state <> 'completed' AND due_at <= now() AND (due_at, id) >= ($2, $3)
      AND (state <> 'running' OR ($6 AND attempts < 2))
    ORDER BY due_at, id LIMIT $4
    FOR UPDATE SKIP LOCKED
),
last AS (SELECT due_at, id FROM due ORDER BY due_at DESC, id DESC LIMIT 1)
UPDATE outbox_message AS message
SET state = 'dispatched',
    dispatches = message.dispatches + 1,
    dispatched_at = clock_timestamp(),
    due_at = clock_timestamp() + $5::interval * (2 ^ LEAST(GREATEST(message.dispatches - message.attempts, 0), 3))
FROM due WHERE message.ctid = due.ctid
RETURNING message.id::text, message.consumer, message.headers ->> 'traceparent',
          (SELECT due_at FROM last), (SELECT id FROM last)
"""

# A worker that died in its second attempt or later may have been killed by this very row, and its neighbours died
# with it: they wait apart from each other instead of meeting again at once.
_RECOVER = """
WITH expired AS MATERIALIZED (
    SELECT ctid FROM outbox_message
    WHERE queue = $1 AND state <> 'completed' AND state = 'running' AND attempts >= 2 AND due_at <= now()
    ORDER BY due_at, id LIMIT $2
    FOR UPDATE SKIP LOCKED
)
UPDATE outbox_message AS message
SET state = 'pending',
    due_at = clock_timestamp() + (0.5 + random() / 2)
             * LEAST($3::interval * (2 ^ LEAST(message.attempts - 2, 16)), $4::interval),
    errors = CASE WHEN jsonb_array_length(errors) >= 10 THEN errors - 1 ELSE errors END
             || jsonb_build_array(jsonb_build_object(
                    'at', clock_timestamp(), 'attempt', attempts, 'type', 'WorkerLost',
                    'message', 'the lease ended without a heartbeat', 'traceback', ''))
FROM expired WHERE message.ctid = expired.ctid
RETURNING message.id
"""

# One index look-up per queue, however many rows each has.
_HEADS = """
WITH RECURSIVE heads AS (
    (SELECT queue, due_at FROM outbox_message WHERE state <> 'completed' ORDER BY queue, due_at LIMIT 1)
    UNION ALL
    SELECT next.queue, next.due_at
    FROM heads CROSS JOIN LATERAL (
        SELECT queue, due_at FROM outbox_message
        WHERE state <> 'completed' AND queue > heads.queue ORDER BY queue, due_at LIMIT 1
    ) AS next
)
SELECT heads.queue, extract(epoch FROM heads.due_at - clock_timestamp())::float8 AS due_in,
       EXISTS (SELECT FROM paused_queue WHERE paused_queue.queue IN (heads.queue, '*')) AS paused
FROM heads
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that this transaction handed out, and where the next scan may start."""

    rows: list[Handover]
    floor: Floor


@dataclass(frozen=True, slots=True)
class QueueHead:
    """A queue with open rows. `due_in` is the seconds until its first row is due, negative when it is."""

    queue: str
    due_in: float
    paused: bool


async def take_due(
    connection: Connection, queue: str, floor: Floor, limit: int, redispatch_after: timedelta, *, expired_leases: bool
) -> Batch | None:
    """Mark up to `limit` due rows of a queue as dispatched; `None` when none is due above the floor."""
    rows = await connection.fetch(_TAKE, queue, floor.due_at, floor.id, limit, redispatch_after, expired_leases)
    if not rows:
        return None
    return Batch([Handover(row[0], row[1], row[2]) for row in rows], Floor(rows[0][3], rows[0][4]))


async def recover_lost(
    connection: Connection, queue: str, limit: int, min_backoff: timedelta, max_backoff: timedelta
) -> int:
    """Put rows back whose worker was lost again, each with a backoff; how many."""
    return len(await connection.fetch(_RECOVER, queue, limit, min_backoff, max_backoff))


async def queue_heads(connection: Connection) -> list[QueueHead]:
    """Every queue with open rows."""
    return [QueueHead(row["queue"], row["due_in"], row["paused"]) for row in await connection.fetch(_HEADS)]
