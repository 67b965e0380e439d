"""The relay's statements on a limited queue: as `dispatching.take_due`, but no more than may run and start now.

The limit holds over all relays and workers, because nothing of such a queue starts that was not handed over, and
whoever hands over holds the queue's row. What must stay true:

- The row is locked in one statement, and what it protects is looked at in the next, which sees all that was committed
  before the lock was free. "No row" means that another relay is at it: stay away.
- A slot is the ID of a delivery, taken for as long as the ledger says that it is handed over or runs. So whatever dies,
  no slot has to be given back. To be due again frees none: the message may still be in the broker, and the worker late.
- What is in flight is found by these IDs: a look costs no more the more is due, delayed or completed.
- A worker claims nothing of such a queue but what is handed over (`delivering`): a copy of a message that the broker
  still has would start a delivery without a slot.

The rate is a bucket that runs out at `per_second` and holds `burst`; a start puts one in, at the time that the worker
wrote down. What was handed over and has not started counts as in it, since it may start at any time. So in a span of t
seconds no more than burst + per_second * t start, however long messages lay in the broker.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from service.ledger.dispatching import AS_DISPATCHED, DUE, NO_FLOOR, batch_of
from service.ledger.sharing import NO_LAST, TURNS, WITH_KEYS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    import asyncpg

    from service.database.driver import Connection
    from service.ledger.dispatching import Batch, Floor, Pauses
    from service.ledger.sharing import KeyTurn, Shares

_LOCK = """
SELECT concurrency, per_second, burst, waiting, running, empty_at, clock_timestamp() AS now
FROM limited_queue WHERE queue = $1 FOR UPDATE SKIP LOCKED
"""

# Once after the limit was set or changed: what was handed over before has its slot too.
_IN_FLIGHT = """
SELECT id FROM outbox_message
WHERE queue = $1 AND state <> 'completed' AND state IN ('dispatched', 'running')
"""

_SEE = """
SELECT id, state, started_at, due_at <= now() AS due, clock_timestamp() AS now
FROM outbox_message WHERE id = ANY($1::uuid[])
"""

# `again` has its slots, however many wait before it.
_AGAIN = f"""
WITH again AS MATERIALIZED (
    SELECT {DUE} FROM outbox_message
    WHERE id = ANY($9::uuid[]) AND state IN ('dispatched', 'running') AND due_at <= now() AND (state <> 'running' OR $6)
    FOR UPDATE SKIP LOCKED
),
"""  # noqa: S608
_TAKE = f"""
{_AGAIN}
fresh AS MATERIALIZED (
    SELECT {DUE} FROM outbox_message
    WHERE queue = $1 AND state <> 'completed' AND due_at <= now() AND (due_at, id) >= ($2, $3)
      AND (state <> 'running' OR $6) AND id <> ALL($10::uuid[])
    ORDER BY due_at, id LIMIT $4
    FOR UPDATE SKIP LOCKED
),
last AS (SELECT due_at, id FROM fresh ORDER BY due_at DESC, id DESC LIMIT 1),
due AS (SELECT * FROM again UNION ALL SELECT * FROM fresh)
{AS_DISPATCHED}
"""  # noqa: S608
_TAKE_TURNS = f"""
{_AGAIN}
fresh AS MATERIALIZED ({TURNS}),
{NO_LAST},
due AS (SELECT * FROM again UNION ALL SELECT * FROM fresh)
{WITH_KEYS}
"""  # noqa: S608

_KEEP = "UPDATE limited_queue SET waiting = $2, running = $3, empty_at = $4 WHERE queue = $1"

_ROUNDED = 1e-6
"""Parts of a start that may be missing where times are rounded."""


class Turn(NamedTuple):
    """What came of a try to hand over.

    Attributes:
        batch: `None` if nothing is due, or may be handed over now.
        wait: Seconds until one more may be; `None` if another has to start or end first.
    """

    batch: Batch | None
    wait: float | None


@dataclass(slots=True)
class _Slots:
    """What is in flight of a queue.

    Attributes:
        concurrency: How many may be; 0 is any number, and so is a `per_second` of 0.
        waiting: Handed over, and not seen to have started.
        running: Seen to run; not kept where any number may.
        empty_at: When the bucket will have run out.
        late: Those of both that are due again, by state.
    """

    concurrency: int
    per_second: float
    burst: int
    waiting: list[UUID]
    running: list[UUID]
    empty_at: datetime
    now: datetime
    late: dict[str, list[UUID]] = field(default_factory=dict)

    @property
    def ids(self) -> list[UUID]:
        return [*self.waiting, *self.running]

    def see(self, rows: Sequence[asyncpg.Record]) -> None:
        """Go by what the ledger says of them now; what it does not know any more has started, who knows when."""
        found = {row["id"]: row for row in rows}
        self.now = rows[0]["now"] if rows else self.now
        by_state = {state: [row for row in rows if row["state"] == state] for state in ("dispatched", "running")}
        self.late = {state: [row["id"] for row in of if row["due"]] for state, of in by_state.items()}
        waiting = {row["id"] for row in by_state["dispatched"]}
        started = [found[each]["started_at"] if each in found else None for each in self.waiting if each not in waiting]
        for at in sorted(at or self.now for at in started):
            self._start(at)
        self.waiting = list(waiting)
        self.running = [row["id"] for row in by_state["running"]] if self.concurrency else []

    def _start(self, at: datetime) -> None:
        if self.per_second:
            self.empty_at = max(self.empty_at, at) + timedelta(seconds=1 / self.per_second)

    def take(self, batch: Batch, rows: Sequence[asyncpg.Record]) -> None:
        """Go by what was marked: it waits now, but for the suspects."""
        marked = {UUID(row[0]) for row in rows}
        handed_over = {UUID(each.delivery_id) for each in batch.deliveries}
        self.waiting = list({*self.waiting, *handed_over})
        self.running = [each for each in self.running if each not in marked]

    def startable(self) -> float:
        """How many may start at this moment beside those that wait."""
        if not self.per_second:
            return float("inf")
        level = max((self.empty_at - self.now).total_seconds(), 0) * self.per_second
        return self.burst - level - len(self.waiting) + _ROUNDED

    def free(self) -> float:
        """How many more may be in flight."""
        return self.concurrency - len(self.ids) if self.concurrency else float("inf")

    def wait(self) -> float | None:
        """Seconds until one more may be handed over, or `None` as in `Turn`."""
        if self.free() < 1 or (self.per_second and len(self.waiting) >= self.burst):
            return None
        return max((1 - self.startable()) / self.per_second, 0.0) if self.per_second else 0.0


async def take_limited(
    connection: Connection,
    queue: str,
    floor: Floor,
    limit: int,
    pauses: Pauses,
    *,
    expired_leases: bool,
    shares: Shares | None = None,
) -> Turn:
    """Mark as many due rows of a limited queue as may be handed over, `limit` at most; see `dispatching.take_due`.

    Those of the keys whose turn it is, where the queue has `shares`.
    """
    row = await connection.fetchrow(_LOCK, queue)
    if row is None:
        return Turn(None, None)
    kept = row["waiting"], row["running"], row["empty_at"]
    slots = _Slots(row["concurrency"] or 0, row["per_second"] or 0, row["burst"] or 0, *kept, row["now"])
    if row["waiting"] is None:
        slots.waiting = [each["id"] for each in await connection.fetch(_IN_FLIGHT, queue)]
        slots.running = []
    if slots.ids:
        slots.see(await connection.fetch(_SEE, slots.ids))
    batch = await _take(connection, queue, floor, limit, pauses, slots, expired_leases, shares)
    if (slots.waiting, slots.running, slots.empty_at) != kept:
        await connection.execute(_KEEP, queue, slots.waiting, slots.running, slots.empty_at)
    return Turn(batch, slots.wait())


async def _take(
    connection: Connection,
    queue: str,
    floor: Floor,
    limit: int,
    pauses: Pauses,
    slots: _Slots,
    expired_leases: bool,
    shares: Shares | None,
) -> Batch | None:
    # What waits and is handed over again starts once; what ran and is handed over again starts again.
    ran = slots.late["running"][: _whole(slots.startable(), limit)] if expired_leases and slots.late else []
    again = [*ran, *slots.late.get("dispatched", [])][:limit]
    fresh = _whole(min(slots.free(), slots.startable() - len(ran)), limit - len(again))
    if not again and not fresh:
        return None
    how = pauses.redispatch_after, expired_leases, pauses.min_backoff, pauses.max_backoff, again, slots.ids

    async def of_keys(turn: KeyTurn) -> Sequence[asyncpg.Record]:
        return await connection.fetch(_TAKE_TURNS, *turn.arguments, *how)

    async def of_all(most: int) -> Sequence[asyncpg.Record]:
        for start in dict.fromkeys((floor, NO_FLOOR)):
            rows = await connection.fetch(_TAKE, queue, start.due_at, start.id, most, *how)
            if rows:
                break
        return rows

    rows = await (shares.take(fresh, of_keys, of_all, again) if shares and fresh else of_all(fresh))
    if not rows:
        return None
    batch = batch_of(rows, floor)
    slots.take(batch, rows)
    return batch


def _whole(number: float, most: int) -> int:
    return max(int(min(number, most)), 0)
