"""What is open, dead and completed per queue and consumer, which queues are limited or paused, and how many relays
there are.

What must stay true: it is cheap however much has been completed. So what is open is counted in the index that holds
nothing else, and what is completed is counted only in a small table, and estimated in a large one. And it changes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.ledger.lanes import standing
from service.ledger.limiting import limited_queues
from service.ledger.pausing import paused_queues

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.limiting import Limit
    from service.ledger.pausing import Pause

SMALL_TABLE = 64 * 2**20
"""Bytes up to which completed rows are counted."""

UNCLAIMED_AFTER = 3
"""Hand-overs without a claim after which a delivery counts as unclaimed."""

_OPEN = f"""
SELECT queue, consumer,
       count(*) FILTER (WHERE state = 'pending') AS pending,
       count(*) FILTER (WHERE state = 'pending' AND due_at = outbox_parked()) AS parked,
       count(*) FILTER (WHERE state = 'dispatched') AS dispatched,
       count(*) FILTER (WHERE state = 'running') AS running,
       count(*) FILTER (WHERE state = 'pending' AND errors <> '[]') AS failed,
       count(*) FILTER (WHERE state = 'dispatched' AND dispatches - attempts >= {UNCLAIMED_AFTER}) AS unclaimed,
       extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE due_at <= now()))::float8 AS oldest
FROM outbox_message WHERE state <> 'completed' GROUP BY queue, consumer
"""  # noqa: S608
# Of each consumer whose dead letters block lanes. What waits is counted lane by lane, in the index that has no others.
_BLOCKED = """
SELECT queue, consumer, count(*) AS blocked, sum(waiting)::bigint AS behind,
       extract(epoch FROM clock_timestamp() - min(died_at))::float8 AS blocked_for
FROM (
    SELECT DISTINCT ON (lane) lane, position, queue, consumer, died_at FROM dead_letter
    WHERE blocks AND coalesce(resolution, '') = '' ORDER BY lane, position
) AS first CROSS JOIN LATERAL (
    SELECT count(*) AS waiting FROM outbox_message AS held
    WHERE held.lane = first.lane AND held.position > first.position AND state <> 'completed'
) AS held GROUP BY queue, consumer
"""
_DEAD = "SELECT queue, consumer, count(*) AS dead FROM dead_letter WHERE resolution IS NULL GROUP BY queue, consumer"
_COMPLETED = """
SELECT queue, consumer, count(*) AS completed FROM outbox_message WHERE state = 'completed' GROUP BY queue, consumer
"""
_SIZE = """
SELECT pg_relation_size(oid) AS bytes, reltuples::bigint AS rows FROM pg_class WHERE oid = 'outbox_message'::regclass
"""
_DUE = """
SELECT queue, count(*) AS open, count(*) FILTER (WHERE due_at <= now()) AS due
FROM outbox_message WHERE state <> 'completed' GROUP BY queue
"""
_RELAYS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND split_part(application_name, ' ', 1) = 'outbox-relay'
"""


@dataclass(slots=True)
class Counts:
    """Deliveries of one consumer; `oldest` is in seconds.

    Of `pending`, `parked` wait for their turn in a lane or for another event, and `failed` for a retry. `blocked` lanes
    wait for somebody to deal with a dead letter of this consumer, the first of them for `blocked_for`, with the
    deliveries `behind` it.
    """

    pending: int = 0
    parked: int = 0
    dispatched: int = 0
    running: int = 0
    failed: int = 0
    unclaimed: int = 0
    dead: int = 0
    blocked: int = 0
    behind: int = 0
    completed: int | None = None
    blocked_for: float | None = None
    oldest: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether any is still to be done."""
        return bool(self.pending or self.dispatched or self.running)


@dataclass(slots=True)
class QueueCounts:
    """A queue with something open or dead, or kept back: its deliveries that are open, due (of these), and dead."""

    open: int = 0
    due: int = 0
    dead: int = 0
    limit: Limit | None = None
    pause: Pause | None = None


@dataclass(frozen=True, slots=True)
class CompletedCount:
    """All completed rows; `count` is `None` before the table was first analyzed."""

    count: int | None
    estimated: bool


@dataclass(slots=True)
class LedgerCounts:
    """All of it, of one moment; `consumers` by queue and consumer. `stranded` lanes wait for a repair."""

    relays: int = 0
    stranded: int = 0
    consumers: dict[tuple[str, str], Counts] = field(default_factory=dict)
    completed: CompletedCount = CompletedCount(None, True)
    paused: list[Pause] = field(default_factory=list)
    limited: list[Limit] = field(default_factory=list)

    def total(self, name: str) -> int:
        return sum(getattr(each, name) or 0 for each in self.consumers.values())

    @property
    def blocked(self) -> int:
        return self.total("blocked")

    @property
    def oldest(self) -> float | None:
        return max((each.oldest for each in self.consumers.values() if each.oldest is not None), default=None)


async def count(connection: Connection, *, exact: bool = False) -> LedgerCounts:
    """Count, in a transaction of its own; what is completed too if it is `exact` or the table is small."""
    found = LedgerCounts()
    # A snapshot of a whole: every number below is of the same moment.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        await connection.execute("SET LOCAL statement_timeout = '60s'")
        size = await connection.fetchrow(_SIZE)
        assert size is not None
        counted = exact or size["bytes"] <= SMALL_TABLE
        if counted:
            await _add(found, connection, _COMPLETED)
        # The statistics of a table that was just filled would have the whole of it read for the few rows that are open.
        await connection.execute("SET LOCAL enable_seqscan = off")
        await _add(found, connection, _OPEN)
        await _add(found, connection, _DEAD)
        await _add(found, connection, _BLOCKED)
        found.paused = await paused_queues(connection)
        found.limited = await limited_queues(connection)
        found.relays = await connection.fetchval(_RELAYS)
        if found.total("parked"):
            found.stranded, _ = await standing(connection, 1, only_stranded=True)
    if counted:
        for each in found.consumers.values():
            each.completed = each.completed or 0
        found.completed = CompletedCount(found.total("completed"), estimated=False)
    elif size["rows"] >= 0:
        still_open = sum(found.total(name) for name in ("pending", "dispatched", "running"))
        found.completed = CompletedCount(max(size["rows"] - still_open, 0), estimated=True)
    return found


async def count_queues(connection: Connection) -> dict[str, QueueCounts]:
    """Every queue with open deliveries, dead letters, a limit or a pause, by name."""
    queues = {row["queue"]: QueueCounts(row["open"], row["due"]) for row in await connection.fetch(_DUE)}
    for row in await connection.fetch(_DEAD):
        queues.setdefault(row["queue"], QueueCounts()).dead += row["dead"]
    for each in await paused_queues(connection):
        queues.setdefault(each.queue, QueueCounts()).pause = each
    for limit in await limited_queues(connection):
        queues.setdefault(limit.queue, QueueCounts()).limit = limit
    return dict(sorted(queues.items()))


async def _add(found: LedgerCounts, connection: Connection, statement: str) -> None:
    for row in await connection.fetch(statement):
        counts = found.consumers.setdefault((row["queue"], row["consumer"]), Counts())
        for name, value in list(row.items())[2:]:
            setattr(counts, name, value)
