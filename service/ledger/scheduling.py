"""Schedules: the statements on `outbox_schedule`, and on the one delivery of each that is its next tick.

A schedule is a delivery that writes its own successor. Its row says which event is published when, and which delivery
may do so next: `tick_id`. Whoever runs that delivery locks the row, publishes, moves `next_at`, writes the next tick
and completes its own, in one transaction (`service/outbox/schedules/ticking.py`). So a tick fires once however many
relays and workers there are, and an outage delays it.

What must stay true: a tick whose id is not `tick_id` does nothing. So a schedule may be changed, paused or removed, and
a tick that was lost be written again, while one is under way; whoever does that locks the row first. Times are
PostgreSQL's. What a person does is recorded in the same transaction (`operations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import Interval, Text

from service.ledger import operations
from service.ledger.delivering import DUE_AFTER
from service.ledger.ids import delivery_id, new_event_id
from service.ledger.statistics import ALIVE
from service.ledger.tables import Timestamp
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from service.database.driver import Connection

TICK = "outbox.tick"
"""The type of the event that a tick is, and the name of its consumer, which every worker has."""

_LATE = timedelta(minutes=1)

_COLUMNS = ("declared", "event_type", "version", "payload", "cron", "every", "tz", "catch_up", "queue")
_NAMES = ", ".join(_COLUMNS)
_MOVED = "(known.cron, known.every, known.tz) IS DISTINCT FROM (excluded.cron, excluded.every, excluded.tz)"

# Only another time of firing starts it anew: an interval goes on where it was when something else is changed.
_PUT = text(f"""
INSERT INTO outbox_schedule AS known (name, {_NAMES})
VALUES (:name, {", ".join(f":{each}" for each in _COLUMNS)})
ON CONFLICT (name) DO UPDATE SET
    {", ".join(f"{each} = excluded.{each}" for each in _COLUMNS)},
    anchor = CASE WHEN {_MOVED} THEN excluded.anchor ELSE known.anchor END,
    next_at = CASE WHEN {_MOVED} THEN NULL ELSE known.next_at END
WHERE (excluded.declared OR NOT known.declared)
  AND ({", ".join(f"known.{each}" for each in _COLUMNS)}) IS DISTINCT FROM
      ({", ".join(f"excluded.{each}" for each in _COLUMNS)})
RETURNING anchor, next_at, tick_id, paused_at IS NOT NULL AS paused, clock_timestamp() AS now
""").bindparams(bindparam("payload", type_=JSONB), bindparam("every", type_=Interval))  # noqa: S608

_FIND = text("SELECT declared, next_at FROM outbox_schedule WHERE name = :name")

_LOCK = text("SELECT *, clock_timestamp() AS now FROM outbox_schedule WHERE name = :name FOR UPDATE")

# A tick is deferred, so that its latency counts from when it is due; what it publishes has its correlation id.
_INTO = "INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, due_at)"
_KIND = f"'{TICK}', 1, '{TICK}'"
_HEADERS = f"""jsonb_build_object('correlation_id', {{event_id}}::uuid::text, '{DUE_AFTER}',
           greatest(extract(epoch FROM {{at}}::timestamptz - clock_timestamp()), 0)::text)"""

_SET_TICK = text(f"""
WITH moved AS (
    UPDATE outbox_schedule SET next_at = :at, tick_id = :tick_id, last_at = coalesce(:last_at, last_at)
    WHERE name = :name
), former AS (
    DELETE FROM outbox_message WHERE id = :former AND state = 'pending'
)
{_INTO}
SELECT CAST(:tick_id AS uuid), CAST(:event_id AS uuid), {_KIND}, CAST(:queue AS text), :payload,
       {_HEADERS.format(event_id="CAST(:event_id AS uuid)", at="CAST(:at AS timestamptz)")}, :at
WHERE NOT CAST(:paused AS boolean)
""").bindparams(  # noqa: S608
    bindparam("payload", type_=JSONB), bindparam("at", type_=Timestamp), bindparam("last_at", type_=Timestamp)
)

_REMOVE = """
WITH removed AS (
    DELETE FROM outbox_schedule WHERE {which} RETURNING name, tick_id
), former AS (
    DELETE FROM outbox_message USING removed WHERE id = tick_id AND state = 'pending'
)
SELECT name FROM removed
"""
_REMOVE_ONE = text(_REMOVE.format(which="name = :name AND NOT declared"))
_REMOVE_OTHERS = text(_REMOVE.format(which="declared AND NOT name = ANY (:names)")).bindparams(
    bindparam("names", type_=ARRAY(Text))
)

_HAS_TICK = """(
    EXISTS (SELECT FROM outbox_message AS open WHERE open.id = schedule.tick_id AND open.state <> 'completed')
    OR EXISTS (SELECT FROM dead_letter WHERE message_id = schedule.tick_id AND resolution IS NULL)
)"""

# Of two that look at once the second may write a tick for nothing: only the one whose id was written last counts.
_LOST = text(f"""
SELECT name, queue, next_at, tick_id FROM outbox_schedule AS schedule
WHERE paused_at IS NULL AND next_at IS NOT NULL AND NOT {_HAS_TICK} ORDER BY name FOR UPDATE
""")  # noqa: S608

_QUEUES = text("SELECT DISTINCT event_type, queue FROM outbox_schedule WHERE NOT declared ORDER BY event_type, queue")
_MOVE = text("""
UPDATE outbox_schedule SET queue = :to WHERE NOT declared AND event_type = :event_type AND queue = :queue
RETURNING name, queue, next_at, tick_id, paused_at IS NOT NULL AS paused
""")

_PAUSE = """
WITH paused AS (
    UPDATE outbox_schedule SET paused_at = clock_timestamp(), paused_by = $2, why = $3
    WHERE name = $1 AND paused_at IS NULL RETURNING name, tick_id
), former AS (
    DELETE FROM outbox_message USING paused WHERE id = tick_id AND state = 'pending'
)
SELECT name FROM paused
"""
_RESUME = f"""
WITH resumed AS (
    UPDATE outbox_schedule AS schedule SET paused_at = NULL, paused_by = NULL, why = NULL,
        tick_id = CASE WHEN {_HAS_TICK} THEN tick_id ELSE $2 END
    WHERE name = $1 AND (paused_at IS NOT NULL OR NOT {_HAS_TICK}) RETURNING name, queue, next_at, tick_id
), written AS (
    {_INTO}
    SELECT tick_id, $3, {_KIND}, queue, jsonb_build_object('schedule', name, 'at', next_at),
           {_HEADERS.format(event_id="$3", at="next_at")}, next_at
    FROM resumed WHERE tick_id = $2
)
SELECT name FROM resumed
"""  # noqa: S608
_RUN = f"""
{_INTO}
SELECT $2, $3, {_KIND}, queue,
       jsonb_build_object('schedule', name, 'at', clock_timestamp(), 'by', $4::text, 'why', $5::text),
       {_HEADERS.format(event_id="$3", at="clock_timestamp()")}, clock_timestamp()
FROM outbox_schedule WHERE name = $1 RETURNING event_id
"""  # noqa: S608
_LISTED = """
SELECT name, declared, event_type, cron, every, tz, catch_up, queue, next_at, last_at, paused_at, paused_by, why,
       next_at - clock_timestamp() AS due_in, clock_timestamp() - paused_at AS paused_for,
       EXISTS (SELECT FROM outbox_message WHERE id = tick_id AND state <> 'completed') AS waits,
       (SELECT id FROM dead_letter WHERE message_id = tick_id AND resolution IS NULL LIMIT 1) AS dead_letter
FROM outbox_schedule
"""
_LIST = f"""
SELECT * FROM ({_LISTED} WHERE strpos(lower(name), lower($1)) > 0) AS listed
WHERE NOT $2 OR paused_at IS NOT NULL OR dead_letter IS NOT NULL OR NOT waits OR due_in < interval '-1 minute'
ORDER BY name LIMIT $3
"""  # noqa: S608

_MARK = text("UPDATE outbox_process SET schedules = :mine WHERE id = :id")
_OTHERS = text("""
SELECT count(*) FROM outbox_process
WHERE kind = 'worker' AND schedules <> :mine AND seen_at > clock_timestamp() - CAST(:alive AS interval)
""").bindparams(bindparam("alive", type_=Interval))

_ONE_AT_A_TIME = text("""
SELECT pg_advisory_xact_lock((x'6f757473'::bigint << 32) | 'outbox_schedule'::regclass::oid::bigint)
""")


@dataclass(frozen=True, slots=True)
class Listed:
    """A schedule, and how it stands.

    Attributes:
        due_in: Until its next tick; negative when that is late.
        paused_for: `None` when it is not paused, as are `paused_at`, `paused_by` and `why`.
        waits: Its next tick is in the ledger.
        dead_letter: What its next tick has become; it stops there until a person decides.
    """

    name: str
    declared: bool
    event_type: str
    cron: str | None
    every: timedelta | None
    tz: str
    catch_up: str
    queue: str
    next_at: datetime
    last_at: datetime | None
    paused_at: datetime | None
    paused_by: str | None
    why: str | None
    due_in: timedelta
    paused_for: timedelta | None
    waits: bool
    dead_letter: int | None

    @property
    def state(self) -> str:
        """`on`; or what keeps it from firing: it is `paused`, `dead`, `lost` (without a tick), or `late`."""
        if self.paused_at is not None:
            return "paused"
        if self.dead_letter is not None:
            return "dead"
        if not self.waits:
            return "lost"
        return "late" if self.due_in < -_LATE else "on"

    @property
    def timing(self) -> str:
        """When it fires: `every 5m`, or `0 3 * * * Europe/Berlin`."""
        if self.every is None:
            return f"{self.cron} {self.tz}"
        seconds = self.every.total_seconds()
        # Exactly, in the largest unit that goes.
        for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
            if seconds % size == 0:
                return f"every {seconds / size:g}{unit}"
        return f"every {seconds:g}s"


@dataclass(frozen=True, slots=True)
class Definition:
    """What is published when. `declared` says that it stands in the code, and not only in its row."""

    name: str
    declared: bool
    event_type: str
    version: int
    payload: dict[str, Any]
    cron: str | None
    every: timedelta | None
    tz: str
    catch_up: str
    queue: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A schedule that is new or was changed. `next_at` is `None` where its time of firing is another now."""

    anchor: datetime
    next_at: datetime | None
    tick_id: UUID | None
    paused: bool
    now: datetime


@dataclass(frozen=True, slots=True)
class Locked(Definition):
    """A schedule whose row is this transaction's."""

    anchor: datetime
    next_at: datetime
    tick_id: UUID
    paused: bool
    now: datetime


async def put(session: AsyncSession, wanted: Definition) -> Changed | None:
    """Create or change a schedule; `None` if it is like that, or declared by the code and this is not."""
    values = {name: getattr(wanted, name) for name in ("name", *_COLUMNS)}
    row = (await session.execute(_PUT, values)).one_or_none()
    return None if row is None else Changed(**row._mapping)  # noqa: SLF001


async def find(session: AsyncSession, name: str) -> tuple[bool, datetime] | None:
    """Whether the code declares it, and its next tick."""
    row = (await session.execute(_FIND, {"name": name})).one_or_none()
    return None if row is None else (row.declared, row.next_at)


async def set_tick(
    session: AsyncSession,
    name: str,
    queue: str,
    at: datetime,
    *,
    former: UUID | None,
    last_at: datetime | None = None,
    paused: bool = False,
) -> None:
    """Write the tick that is the next one from now on, unless the schedule is paused.

    Args:
        name: The schedule, whose row is this transaction's.
        queue: Where the tick waits.
        at: When it is due.
        former: The tick before it, which goes if nobody has it yet.
        last_at: The latest that was published, if that has changed.
        paused: Nothing is to happen at that time, until it is resumed.
    """
    event_id = new_event_id()
    values = {"name": name, "queue": queue, "at": at, "former": former, "last_at": last_at, "paused": paused}
    values |= {"event_id": event_id, "tick_id": delivery_id(event_id, 1)}
    await session.execute(_SET_TICK, values | {"payload": {"schedule": name, "at": at.isoformat()}})


async def lock(session: AsyncSession, name: str) -> Locked | None:
    """Take a schedule's row; `None` if there is none."""
    row = (await session.execute(_LOCK, {"name": name})).mappings().one_or_none()
    if row is None:
        return None
    fields = {each: row[each] for each in ("name", *_COLUMNS, "anchor", "next_at", "tick_id", "now")}
    return Locked(**fields, paused=row["paused_at"] is not None)


async def remove(session: AsyncSession, name: str) -> bool:
    """Remove a schedule that the code does not declare, and the tick that waits; whether there was one."""
    return (await session.execute(_REMOVE_ONE, {"name": name})).one_or_none() is not None


async def remove_other_declared(session: AsyncSession, names: Sequence[str]) -> list[str]:
    """Remove what code declared, but for these names; which ones."""
    return sorted(await session.scalars(_REMOVE_OTHERS, {"names": list(names)}))


async def write_lost_ticks(session: AsyncSession) -> list[str]:
    """Write the tick of each schedule that has none, as after rows were deleted by hand; which ones."""
    lost = (await session.execute(_LOST)).all()
    for row in lost:
        await set_tick(session, row.name, row.queue, row.next_at, former=row.tick_id)
    return [row.name for row in lost]


async def queues(session: AsyncSession) -> list[tuple[str, str]]:
    """Each type of event with each queue in which ticks of schedules wait that were made at run time."""
    return [(row.event_type, row.queue) for row in await session.execute(_QUEUES)]


async def move(session: AsyncSession, event_type: str, queue: str, to: str) -> None:
    """Let the ticks of these wait in another queue."""
    values = {"event_type": event_type, "queue": queue, "to": to}
    for row in (await session.execute(_MOVE, values)).all():
        await set_tick(session, row.name, to, row.next_at, former=row.tick_id, paused=row.paused)


async def one_at_a_time(session: AsyncSession) -> None:
    """Wait for other workers that look after the declared schedules, until this transaction ends."""
    await session.execute(_ONE_AT_A_TIME)


async def mark(session: AsyncSession, process: UUID, mine: str) -> None:
    """Say of a process which schedules its code declares."""
    await session.execute(_MARK, {"id": process, "mine": mine})


async def count_others(session: AsyncSession, mine: str) -> int:
    """Worker processes that are alive and whose code declares other schedules."""
    return int(await session.scalar(_OTHERS, {"mine": mine, "alive": ALIVE}) or 0)


async def list_all(
    connection: Connection, *, having: str = "", only_standing: bool = False, limit: int | None = None
) -> list[Listed]:
    """Schedules by name: those that have this in it, and if so asked only what is paused or does not fire in time."""
    rows = await connection.fetch(_LIST, storable(having), only_standing, limit)
    return [Listed(**row) for row in rows]


async def look_up(connection: Connection, name: str) -> Listed | None:
    """The schedule of this name."""
    row = await connection.fetchrow(f"{_LISTED} WHERE name = $1", storable(name))
    return None if row is None else Listed(**row)


async def pause(connection: Connection, name: str, *, by: str, why: str | None) -> bool:
    """Let nothing be published by a schedule; whether it was not paused before."""
    words = storable(by), None if why is None else storable(why)
    async with connection.transaction():
        changed = await connection.fetchrow(_PAUSE, storable(name), *words) is not None
        if changed:
            await operations.record(connection, "pause", {"schedule": name}, by=by, why=why)
    return changed


async def resume(connection: Connection, name: str, *, by: str, why: str | None) -> bool:
    """Let it go on, also where its tick is lost; whether there was something to do."""
    event_id = new_event_id()
    async with connection.transaction():
        row = await connection.fetchrow(_RESUME, storable(name), delivery_id(event_id, 1), event_id)
        if row is not None:
            await operations.record(connection, "resume", {"schedule": name}, by=by, why=why)
    return row is not None


async def run(connection: Connection, name: str, *, by: str, why: str | None) -> UUID | None:
    """Publish its event once more, now; the id of the event that does so, or `None` if there is no such schedule."""
    event_id = new_event_id()
    words = storable(by), None if why is None else storable(why)
    async with connection.transaction():
        found: UUID | None = await connection.fetchval(_RUN, storable(name), delivery_id(event_id, 1), event_id, *words)
        if found is not None:
            await operations.record(connection, "run", {"schedule": name}, by=by, why=why)
    return found
