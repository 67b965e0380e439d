"""Lanes: deliveries that take effect one at a time, in the order in which their publishers committed.

A delivery in a lane is *parked* until its turn comes: it is `pending` and due in the year 9000. So relay, claim, floor
and high-water mark know nothing of lanes, since `due_at` is still the only clock. Whoever ends a row lets the next one
of its lane come due, in the same transaction.

    enters      `outbox_enter_lane`, at the commit of whatever inserted a row with a `lane`: it takes its `position`,
                and is due at once where the lane is free
    leaves      `outbox_leave_lane`, at the commit of whatever completed or deleted an open row: a worker's completion,
                a death, a cancellation, an expiry. The next one comes due, unless a dead letter blocks the lane
    goes on     `outbox_unblock_lane`, at the commit of whatever resolved a dead letter that blocked

A worker that has completed a delivery in its own loop claims what came due by that, past relay and broker, as if its
message had come (`delivering.claim_next`). For that its completion wakes no relay. If it dies in between, the relay's
next look finds the row, which is due like any other.

All of it is triggers of the tables (`migrations/ledger/*_lanes.py`): whoever writes there need not know of lanes, not
even an older version of this code. They are deferred to the commit, and see nothing of a savepoint that was undone.

What must stay true:

- At most one row of a lane is open and not parked. Positions are in the order of commits. Where rows are open and no
  dead letter blocks, exactly one is not parked.
- Whoever enters, leaves or goes on holds the lane's lock from before it looks until its transaction has ended, and
  looks in a statement that began after it had the lock: one that began before sees the lane as it was. The position is
  taken under the lock, too. `tests/proof/lanes/model.py` finds what goes wrong without each of these.
- A transaction takes all its locks at once and sorted.
- The newest row that has a position is open while any row of the lane is: that alone tells whether a lane is free.

A repair is recorded in the same transaction (`operations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from service.ledger import operations

if TYPE_CHECKING:
    import asyncpg

    from service.database.driver import Connection

_PARKED = datetime(9000, 1, 1, tzinfo=UTC)
"""As `outbox_parked()` of the database has it."""


def parked(lane: str | None) -> dict[str, Any]:
    """The columns of a new row that waits for its turn in a lane, or outside of any."""
    return {"lane": lane, "due_at": _PARKED}


_STANDING = """
WITH parked AS (
    SELECT lane, count(*) AS waiting, min(position) AS first FROM outbox_message
    WHERE state <> 'completed' AND due_at = outbox_parked() AND position IS NOT NULL GROUP BY lane
), blocking AS (
    SELECT DISTINCT ON (lane) lane, id AS letter, consumer, queue, reason, clock_timestamp() - died_at AS age
    FROM dead_letter WHERE blocks AND coalesce(resolution, '') = '' ORDER BY lane, position
), judged AS (
    SELECT lane, coalesce(waiting, 0) AS waiting, letter, reason, age, blocking.consumer AS died_in,
           blocking.queue AS died_of, head.*,
           letter IS NULL AND head.state IS NULL AND NOT EXISTS (
               SELECT FROM outbox_message AS behind
               WHERE behind.lane = parked.lane AND behind.position > first AND behind.state <> 'completed'
                 AND behind.due_at < outbox_parked()) AS stranded
    FROM parked FULL JOIN blocking USING (lane)
    LEFT JOIN LATERAL (
        SELECT consumer, queue, state, attempts, due_at - clock_timestamp() AS due_in, errors -> -1 ->> 'type' AS error,
               EXISTS (SELECT FROM paused_queue WHERE paused_queue.queue IN (message.queue, '*')) AS paused
        FROM outbox_message AS message
        WHERE message.lane = parked.lane AND message.position < parked.first AND message.state <> 'completed'
        ORDER BY message.position DESC LIMIT 1
    ) AS head ON letter IS NULL
)
SELECT *, count(*) OVER () AS lanes FROM judged WHERE stranded OR NOT $2
ORDER BY stranded DESC, letter IS NULL, waiting DESC, lane LIMIT $1
"""

# Everything is seen as it is under the lock. Positions begin at 1.
_REPAIR = """
SELECT outbox_advance_lane($1, 0) FROM (
    SELECT min(position) FILTER (WHERE due_at = outbox_parked()) AS first,
           count(*) FILTER (WHERE due_at < outbox_parked()) AS running
    FROM outbox_message WHERE lane = $1 AND state <> 'completed' AND position IS NOT NULL
) AS lane WHERE first IS NOT NULL AND running = 0 AND NOT outbox_lane_blocked($1)
"""


@dataclass(frozen=True, slots=True)
class StandingLane:
    """A lane in which something waits, or that a dead letter blocks.

    Attributes:
        waiting: How many are parked in it.
        kind: What its first delivery does: it is `dead` or `running`, waits in the broker (`dispatched`), for a relay
            (`due`), for another attempt (`failed`), or for its queue to be resumed (`paused`); or there is none, and
            the lane is `stranded`.
        consumer: Of the first delivery, and its `queue`.
        number: Its attempt, or the dead letter.
        why: What its last attempt failed with, or the dead letter's reason.
        span: Until its next attempt or the end of its lease; or since it died.
    """

    lane: str
    waiting: int
    kind: str
    consumer: str | None
    queue: str | None
    number: int
    why: str | None
    span: timedelta


async def standing(
    connection: Connection, limit: int, *, only_stranded: bool = False
) -> tuple[int, list[StandingLane]]:
    """How many lanes stand, and `limit` of them: first stranded ones, then blocked ones, then those where most wait."""
    rows = await connection.fetch(_STANDING, limit, only_stranded)
    return (rows[0]["lanes"] if rows else 0), [_standing(row) for row in rows]


def _standing(row: asyncpg.Record) -> StandingLane:
    lane, waiting = row["lane"], row["waiting"]
    if row["letter"] is not None:
        return StandingLane(
            lane, waiting, "dead", row["died_in"], row["died_of"], row["letter"], row["reason"], row["age"]
        )
    if row["state"] is None:
        return StandingLane(lane, waiting, "stranded", None, None, 0, None, timedelta())
    kind, attempt = row["state"], row["attempts"]
    if kind == "pending":
        kind = "paused" if row["paused"] else "failed" if row["error"] else "due"
        attempt += 1
    return StandingLane(lane, waiting, kind, row["consumer"], row["queue"], attempt, row["error"], row["due_in"])


async def repair(connection: Connection, lane: str, *, by: str, why: str | None) -> bool:
    """Let the first that waits in a lane come due, if nothing else of it is open and no dead letter blocks; whether so.

    Raises:
        asyncpg.PostgresError: above READ COMMITTED.
    """
    async with connection.transaction(isolation="read_committed"):
        await connection.execute("SELECT outbox_lock_lanes(ARRAY[$1::text])", lane)
        changed = await connection.fetchrow(_REPAIR, lane) is not None
        if changed:
            await operations.record(connection, "repair", {"lane": lane}, by=by, why=why)
    return changed
