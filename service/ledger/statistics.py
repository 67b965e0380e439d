"""What workers have run, minute by minute and in all, and which processes there are: every statement on both.

What must stay true: nothing is written per delivery, since each process adds what it counted now and then; two that
add never deadlock, since both write rows in the order of their key; and nobody waits for a disk or a standby here,
because others may wait for the same rows. The totals are rows of a minute that is never purged, so counters go on
where they were after a restart.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from uuid import UUID

    import asyncpg

    from service.database.driver import Connection

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3_600)
"""Seconds up to which each bucket reaches; one more takes the rest. What is stored goes by the place alone, so others
take another column."""

ALIVE = timedelta(seconds=45)
"""For so long after it was seen a process counts as alive: it reports every 10 s, a sleeping relay every 15 s."""

FORGET_PROCESSES_AFTER = timedelta(hours=1)

# What is counted need not survive a crash of PostgreSQL, and a wait for the disk or a standby would keep rows locked.
_AT_EASE = "(SELECT set_config('synchronous_commit', 'off', true))"

_COUNTED = """
count, run_seconds, run_buckets, start_seconds, start_buckets, effect_seconds, effect_buckets
"""

_SUM = """ARRAY(
    SELECT coalesce(mine, 0) + coalesce(more, 0)
    FROM unnest(known.{0}, excluded.{0}) WITH ORDINALITY AS bucket (mine, more, place) ORDER BY place)"""

_ADD = f"""
INSERT INTO outbox_minute AS known (minute, queue, consumer, outcome, {_COUNTED})
SELECT minute, queue, consumer, outcome, {_COUNTED}
FROM jsonb_to_recordset($1::text::jsonb) AS added (
         queue text, consumer text, outcome text, count bigint, run_seconds float8, run_buckets bigint[],
         start_seconds float8, start_buckets bigint[], effect_seconds float8, effect_buckets bigint[])
CROSS JOIN (VALUES ('-infinity'::timestamptz), (date_trunc('minute', clock_timestamp()))) AS place (minute)
ORDER BY minute, queue, consumer, outcome
ON CONFLICT (minute, queue, consumer, outcome) DO UPDATE SET
    count = known.count + excluded.count,
    run_seconds = known.run_seconds + excluded.run_seconds,
    run_buckets = {_SUM.format("run_buckets")},
    start_seconds = known.start_seconds + excluded.start_seconds,
    start_buckets = {_SUM.format("start_buckets")},
    effect_seconds = known.effect_seconds + excluded.effect_seconds,
    effect_buckets = {_SUM.format("effect_buckets")}
RETURNING {_AT_EASE}
"""  # noqa: S608

_TOTALS = f"SELECT queue, consumer, outcome, {_COUNTED} FROM outbox_minute WHERE minute = '-infinity'"  # noqa: S608

_MINUTES = f"""
SELECT minute, queue, consumer, outcome, {_COUNTED} FROM outbox_minute
WHERE minute > '-infinity' AND minute >= clock_timestamp() - $1::interval
ORDER BY minute, queue, consumer, outcome
"""  # noqa: S608

_FORGET_MINUTES = """
DELETE FROM outbox_minute WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM outbox_minute WHERE minute > '-infinity' AND minute < clock_timestamp() - $1::interval LIMIT $2))
"""

_REPORT = f"""
INSERT INTO outbox_process (id, kind, host, pid, queues, threads, version, started_at, running, loop_lag, pool_timeouts)
VALUES ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() - $8::interval, $9, $10, $11)
ON CONFLICT (id) DO UPDATE SET
    seen_at = clock_timestamp(), running = excluded.running, loop_lag = excluded.loop_lag,
    pool_timeouts = excluded.pool_timeouts
RETURNING {_AT_EASE}
"""  # noqa: S608

_LEAVE = f"DELETE FROM outbox_process WHERE id = $1 RETURNING {_AT_EASE}"  # noqa: S608

_PROCESSES = """
SELECT id, kind, host, pid, queues, threads, version, started_at, seen_at, running, loop_lag, pool_timeouts,
       clock_timestamp() - seen_at AS unseen_for
FROM outbox_process
WHERE seen_at > clock_timestamp() - $1::interval ORDER BY kind, host, pid, id
"""

_FORGET_PROCESSES = "DELETE FROM outbox_process WHERE seen_at < clock_timestamp() - $1::interval"


OUTCOMES = ("completed", "failed", "dead", "expired", "lost", "released", "unknown")


class Key(NamedTuple):
    """What is counted apart; the outcome is one of `OUTCOMES`."""

    queue: str
    consumer: str
    outcome: str


@dataclass(slots=True)
class Histogram:
    """Durations: their sum in seconds, and how many fell into each bucket of `BOUNDS` (not those below it)."""

    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS, seconds)] += 1

    def merge(self, other: Histogram) -> None:
        self.seconds += other.seconds
        self.buckets = [mine + more for mine, more in zip(self.buckets, other.buckets, strict=True)]

    def quantile(self, share: float) -> float | None:
        """Seconds that this share of them did not exceed, between the bounds of a bucket in proportion; the last bound
        for what is beyond it, and `None` of nothing."""
        rank, below, lower = share * sum(self.buckets), 0, 0.0
        if not rank:
            return None
        for bound, count in zip(BOUNDS, self.buckets, strict=False):
            if below + count >= rank:
                return lower + (bound - lower) * (rank - below) / count
            below, lower = below + count, bound
        return lower


@dataclass(slots=True)
class Runs:
    """Runs that came to one outcome.

    Attributes:
        count: How many.
        run: From the claim until the outcome was written down.
        start: From when the event was there, or due for the first time, until the claim; of first attempts.
        effect: From then until the effect had happened; of completed runs, with all attempts before.
    """

    count: int = 0
    run: Histogram = field(default_factory=Histogram)
    start: Histogram = field(default_factory=Histogram)
    effect: Histogram = field(default_factory=Histogram)

    def merge(self, other: Runs) -> None:
        self.count += other.count
        self.run.merge(other.run)
        self.start.merge(other.start)
        self.effect.merge(other.effect)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process as it is from its start on. `queues` are those that it takes from, `threads` those that run actors."""

    id: UUID
    kind: str
    host: str
    pid: int
    queues: list[str]
    threads: int
    version: str


class Vitals(NamedTuple):
    """What a process tells of itself: how many deliveries it runs, the longest lag of its event loop in the last 10 s,
    in seconds, and how often since its start somebody waited in vain for a connection of its pool."""

    running: int = 0
    loop_lag: float = 0.0
    pool_timeouts: int = 0


AT_REST = Vitals()


@dataclass(frozen=True, slots=True)
class SeenProcess(ProcessIdentity):
    """A process as it was when it reported last, with its `Vitals`."""

    started_at: datetime
    seen_at: datetime
    running: int
    loop_lag: float
    pool_timeouts: int
    unseen_for: timedelta


async def add(connection: Connection, counted: Mapping[Key, Runs]) -> None:
    """Add to this minute, by PostgreSQL's clock, and to the totals."""
    if counted:
        rows = [key._asdict() | dict(_columns(counts)) for key, counts in counted.items()]
        await connection.execute(_ADD, json.dumps(rows))


def _columns(counts: Runs) -> Iterator[tuple[str, object]]:
    for name, value in asdict(counts).items():
        if isinstance(value, dict):
            yield f"{name}_seconds", value["seconds"]
            yield f"{name}_buckets", value["buckets"]
        else:
            yield name, value


async def totals(connection: Connection) -> dict[Key, Runs]:
    """All that was ever counted."""
    return {_key(row): _counts(row) for row in await connection.fetch(_TOTALS)}


async def minutes(connection: Connection, since: timedelta) -> list[tuple[datetime, Key, Runs]]:
    """What was counted in each minute that began within the last `since`, the oldest first."""
    return [(row["minute"], _key(row), _counts(row)) for row in await connection.fetch(_MINUTES, since)]


def _key(row: asyncpg.Record) -> Key:
    return Key(row["queue"], row["consumer"], row["outcome"])


def _counts(row: asyncpg.Record) -> Runs:
    histograms = {
        name: Histogram(row[f"{name}_seconds"], row[f"{name}_buckets"]) for name in ("run", "start", "effect")
    }
    return Runs(row["count"], **histograms)


async def forget_minutes(connection: Connection, keep: timedelta, limit: int) -> int:
    """Remove up to `limit` rows of minutes older than that, which must be over; how many. The totals stay."""
    return _affected(await connection.execute(_FORGET_MINUTES, keep, limit))


async def report(connection: Connection, process: ProcessIdentity, up_for: timedelta, vitals: Vitals = AT_REST) -> None:
    """Tell that the process is alive, for how long it has been, and what it does."""
    await connection.execute(
        _REPORT, process.id, process.kind, process.host, process.pid, process.queues, process.threads,
        process.version, up_for, *vitals,
    )  # fmt: skip


async def leave(connection: Connection, process: ProcessIdentity) -> None:
    """Tell that the process ends."""
    await connection.execute(_LEAVE, process.id)


async def processes(connection: Connection, seen_within: timedelta = ALIVE) -> list[SeenProcess]:
    """Those that are there, in order."""
    return [SeenProcess(**row) for row in await connection.fetch(_PROCESSES, seen_within)]


async def forget_processes(connection: Connection, unseen_for: timedelta = FORGET_PROCESSES_AFTER) -> int:
    """Remove those that have not reported for that long, killed ones most of all; how many."""
    return _affected(await connection.execute(_FORGET_PROCESSES, unseen_for))


def _affected(status: str) -> int:
    return int(status.rpartition(" ")[2])
