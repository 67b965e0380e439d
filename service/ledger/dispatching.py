"""The relay's statements: what is due, and marking it as handed over.

What must stay true: states are literals and plans are made for the values at hand (`force_custom_plan`), or a plan
made on an empty table serves the full one; every statement is bounded in rows; leases and delays are written with
`clock_timestamp()`.

The floor: where another transaction anywhere keeps dead index entries alive, a scan from the left of the index crawls
over everything already handed over. So scans start at the last row of the one before, and a sweep without the floor
finds what committed late below it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from service.ledger.delivering import SHARE_KEY, SHARED, SUSPECT_FROM, WORKER_LOST, errors_with
from service.ledger.message import DueDelivery
from service.ledger.pausing import EVERY_QUEUE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import asyncpg

    from service.database.driver import Connection


@dataclass(frozen=True, slots=True)
class Floor:
    """The position of a row in the order of hand-over."""

    due_at: datetime
    id: UUID


NO_FLOOR = Floor(datetime(1, 1, 1, tzinfo=UTC), UUID(int=0))

# Marks each row that is due. One handed over again and again without being claimed waits longer each time; the
# exponent is bounded, because an interval out of range would abort the whole batch for ever. A locked row keeps its
# place in the table (ctid) until the transaction ends, so the update finds it without an index.
#
# A suspect: a worker that died in its second attempt or later may have been killed by this very row, and its neighbours
# died with it. They wait apart from each other instead of meeting again at once. They are set apart where they are met,
# in the order of hand-over: to look for them would cost as much as all that waits beside them.
_LOST = f"""
jsonb_build_object('type', '{WORKER_LOST}', 'message', 'the lease ended without a heartbeat', 'traceback', '')
"""
DUE = f"ctid, id, due_at, state, state = 'running' AND attempts >= {SUSPECT_FROM} AS suspect"
"""What `AS_DISPATCHED` goes by, of each row."""

AS_DISPATCHED = f"""
UPDATE outbox_message AS message
SET state = CASE WHEN due.suspect THEN 'pending' ELSE 'dispatched' END,
    dispatches = CASE WHEN due.suspect THEN message.dispatches ELSE message.dispatches + 1 END,
    dispatched_at = CASE WHEN due.suspect THEN message.dispatched_at ELSE clock_timestamp() END,
    due_at = clock_timestamp() + CASE
        WHEN due.suspect THEN (0.5 + random() / 2)
             * LEAST($7::interval * (2 ^ LEAST(message.attempts - {SUSPECT_FROM}, 16)), $8::interval)
        ELSE $5::interval * (2 ^ LEAST(GREATEST(message.dispatches - message.attempts, 0), 3)) END,
    errors = CASE WHEN due.suspect THEN {errors_with(_LOST)} ELSE message.errors END
FROM due WHERE message.ctid = due.ctid
RETURNING message.id::text, message.consumer, message.headers ->> 'traceparent',
          (SELECT due_at FROM last), (SELECT id FROM last),
          CASE WHEN due.suspect THEN 'suspect' ELSE due.state END
"""  # noqa: S608
"""Marks what is `due`; `last` is where the next scan may start. The rows are for `batch_of`."""

# That a queue is limited is seen here too: a relay may have been stopped since it last looked.
_TAKE_DUE = f"""
WITH due AS MATERIALIZED (
    SELECT {DUE} FROM outbox_message
    WHERE queue = $1 AND state <> 'completed' AND due_at <= now() AND (due_at, id) >= ($2, $3)
      AND (state <> 'running' OR $6) AND NOT EXISTS (SELECT FROM limited_queue WHERE limited_queue.queue = $1)
    ORDER BY due_at, id LIMIT $4
    FOR UPDATE SKIP LOCKED
),
last AS (SELECT due_at, id FROM due ORDER BY due_at DESC, id DESC LIMIT 1)
{AS_DISPATCHED}
"""  # noqa: S608

# One index look-up per queue, however many rows each has.
_HEADS = f"""
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
       EXISTS (SELECT FROM paused_queue WHERE paused_queue.queue IN (heads.queue, '{EVERY_QUEUE}')) AS paused,
       EXISTS (SELECT FROM limited_queue WHERE limited_queue.queue = heads.queue) AS limited,
       EXISTS (SELECT FROM outbox_message
               WHERE {SHARED} AND {SHARE_KEY} > heads.queue || ':' AND {SHARE_KEY} < heads.queue || ';') AS shared
FROM heads
"""  # noqa: S608


# The same for queues that are known, above their floors: it crawls over nothing that has been handed over.
_DUE_QUEUES = f"""
SELECT known.queue
FROM unnest($1::text[], $2::timestamptz[], $3::uuid[]) AS known (queue, due_at, id)
CROSS JOIN LATERAL (
    SELECT FROM outbox_message AS message
    WHERE message.queue = known.queue AND state <> 'completed' AND message.due_at <= now()
      AND (message.due_at, message.id) >= (known.due_at, known.id)
    ORDER BY message.due_at, message.id LIMIT 1
) AS due
WHERE NOT EXISTS (SELECT FROM paused_queue WHERE paused_queue.queue IN (known.queue, '{EVERY_QUEUE}'))
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Batch:
    """What this transaction hands over, and where the next scan may start.

    Attributes:
        suspects: How many were set apart instead.
        unclaimed: How many of them had been handed over before, and no worker had claimed them in time.
        lost: How many were taken from a worker whose lease had ended, with the suspects.
    """

    deliveries: list[DueDelivery]
    floor: Floor
    suspects: int
    unclaimed: int
    lost: int


@dataclass(frozen=True, slots=True)
class Pauses:
    """For how long rows are left alone that were handed over, or whose worker was lost again (doubled each time)."""

    redispatch_after: timedelta
    min_backoff: timedelta
    max_backoff: timedelta


@dataclass(frozen=True, slots=True)
class QueueHead:
    """A queue with open rows. `due_in` is the seconds until its first row is due, negative when it is.

    It is `shared` where some of them have a key (`sharing.py`).
    """

    queue: str
    due_in: float
    paused: bool
    limited: bool
    shared: bool


async def take_due(
    connection: Connection, queue: str, floor: Floor, limit: int, pauses: Pauses, *, expired_leases: bool
) -> Batch | None:
    """Mark up to `limit` due rows of a queue as dispatched, suspects as pending; `None` if none is due above the floor.

    Args:
        expired_leases: Whether a row that is `running` may be taken from its worker when its lease has ended.
    """
    rows = await rows_due(connection, queue, floor, limit, pauses, expired_leases=expired_leases)
    return batch_of(rows, floor) if rows else None


async def rows_due(
    connection: Connection, queue: str, floor: Floor, limit: int, pauses: Pauses, *, expired_leases: bool
) -> Sequence[asyncpg.Record]:
    """The same, for `batch_of`."""
    return await connection.fetch(
        _TAKE_DUE, queue, floor.due_at, floor.id, limit, pauses.redispatch_after, expired_leases,
        pauses.min_backoff, pauses.max_backoff,
    )  # fmt: skip


def batch_of(rows: Sequence[asyncpg.Record], floor: Floor) -> Batch:
    """The batch of what `AS_DISPATCHED` returned; the floor stays where it was if there is no `last`."""
    deliveries = [DueDelivery(row[0], row[1], row[2]) for row in rows if row[5] != "suspect"]
    found = Counter([row[5] for row in rows])
    suspects = found["suspect"]
    floor = floor if rows[0][3] is None else Floor(rows[0][3], rows[0][4])
    return Batch(deliveries, floor, suspects, unclaimed=found["dispatched"], lost=found["running"] + suspects)


async def queue_heads(connection: Connection) -> list[QueueHead]:
    """Every queue with open rows."""
    return [QueueHead(*row) for row in await connection.fetch(_HEADS)]


async def due_queues(connection: Connection, floors: Mapping[str, Floor]) -> list[str]:
    """Which of these queues have a row that is due above the floor and are not paused."""
    columns = (list(floors), [floor.due_at for floor in floors.values()], [floor.id for floor in floors.values()])
    return [row["queue"] for row in await connection.fetch(_DUE_QUEUES, *columns)]
