"""What people do to the ledger: a row for each act, which is the record of who did what, when and why.

What is over at once, such as a pause, is recorded in the transaction that does it. What takes a while, a replay or
discard, is a row before it begins: with the dead letters that were meant, as they were found when somebody looked, and
with how far it came. `replaying.py` carries it out.

What must stay true:

- No act without its row, and no row says more than was done: both are one transaction.
- One process at a time carries an operation out: each of its steps matches the `runner` that took it. A process that
  is killed, wherever, leaves an operation that was seen last when it died; it counts as interrupted, and any other
  process may take it and go on.
- A row never holds a payload or a part of one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    import asyncpg

    from service.database.driver import Connection

MOST = 100_000
"""Dead letters of one operation at most."""

_SHOWN = 100
"""Refused ones whose ids are kept."""

# A runner writes at least every `replaying.REST`, unless it waits for a lock.
_SILENT = "seen_at < clock_timestamp() - interval '15 s'"

_RECORD = """
INSERT INTO outbox_operation (kind, about, asked_by, why, ended_at)
VALUES ($1, $2::text::jsonb, $3, $4, clock_timestamp()) RETURNING id
"""
_PLAN = """
INSERT INTO outbox_operation (kind, about, asked_by, why, state, ids, total, rate)
VALUES ($1, $2::text::jsonb, $3, $4, 'planned', $5, cardinality($5::bigint[]), $6) RETURNING id
"""
# What was looked at and never begun is no act of anybody's.
_FORGET = """
DELETE FROM outbox_operation WHERE state = 'planned' AND asked_at < clock_timestamp() - interval '1 day'
"""
_LOCK = f"""
SELECT kind, state, state IN ('planned', 'stopped') OR state = 'running' AND {_SILENT} AS free
FROM outbox_operation WHERE id = $1 FOR UPDATE
"""  # noqa: S608  from above alone
_TAKE = """
UPDATE outbox_operation
SET state = 'running', runner = $2, rate = coalesce($3, rate), seen_at = clock_timestamp(), ended_at = NULL
WHERE id = $1
"""
_STOP = """
UPDATE outbox_operation SET state = 'stopped', ended_at = clock_timestamp() WHERE id = $1 AND state = 'running'
"""
_NEXT = """
UPDATE outbox_operation SET seen_at = clock_timestamp() WHERE id = $1 AND runner = $2 AND state = 'running'
RETURNING kind, asked_by, why, rate, total, done + refused AS dealt,
          ids[done + refused + 1 : done + refused
              + CASE WHEN rate IS NULL THEN $3::int ELSE greatest(1, least($3, floor(rate / 4)))::int END] AS ids
"""
_COUNT = f"""
UPDATE outbox_operation
SET done = done + $3, refused = refused + cardinality($4::bigint[]), seen_at = clock_timestamp(),
    refused_ids = (refused_ids || $4)[1:{_SHOWN}],
    state = CASE WHEN done + refused + $3 + cardinality($4) < total THEN state ELSE 'finished' END,
    ended_at = CASE WHEN done + refused + $3 + cardinality($4) < total THEN NULL ELSE clock_timestamp() END
WHERE id = $1 AND runner = $2
"""  # noqa: S608
_TOUCH = """
UPDATE outbox_operation SET seen_at = clock_timestamp() WHERE id = $1 AND runner = $2 AND state = 'running' RETURNING 1
"""

STATE = f"CASE WHEN state = 'running' AND {_SILENT} THEN 'interrupted' ELSE state END"
"""SQL for an operation's state, as `Operation` has it."""

_COLUMNS = f"""
id, kind, about::text AS about, asked_at, asked_by, asked_role, why, {STATE} AS state, total,
done, refused, refused_ids, rate, ended_at
"""
_LOAD = f"SELECT {_COLUMNS} FROM outbox_operation WHERE id = $1"  # noqa: S608
_LIST = f"""
SELECT {_COLUMNS} FROM outbox_operation
WHERE total > 0 AND state <> 'planned' AND ($2::boolean IS FALSE OR state <> 'finished')
ORDER BY id DESC LIMIT $1
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Operation:
    """An act of somebody's.

    Attributes:
        kind: `replay` and `discard` take a while; others, such as `edit`, `pause` and `resume`, are over at once.
        about: What it was about, by name: a filter, a queue, a dead letter.
        asked_by: Who it was, as they said; `asked_role` is the database's word.
        state: `planned` is looked at and not begun, `interrupted` one whose process is gone.
        total: Dead letters that were meant, of which so many are `done` or `refused`.
        refused_ids: The first 100 that were left alone; `replaying.refusals` says why.
        rate: How many per second at most.
    """

    id: int
    kind: str
    about: Mapping[str, Any]
    asked_at: datetime
    asked_by: str
    asked_role: str
    why: str | None
    state: Literal["planned", "running", "interrupted", "stopped", "finished"]
    total: int
    done: int
    refused: int
    refused_ids: Sequence[int]
    rate: float | None
    ended_at: datetime | None

    @property
    def can_resume(self) -> bool:
        """Whether somebody may go on with it."""
        return self.state in ("planned", "stopped", "interrupted")


@dataclass(frozen=True, slots=True)
class Portion:
    """What its runner does next; `dealt` of `total` are behind it."""

    kind: str
    by: str
    why: str | None
    rate: float | None
    total: int
    dealt: int
    ids: Sequence[int]


async def record(
    connection: Connection, kind: str, about: Mapping[str, Any], *, by: str, why: str | None = None
) -> int:
    """Record an act that is over at once, in the transaction that does it; its number."""
    number: int = await connection.fetchval(_RECORD, kind, *_words(about, by, why))
    return number


async def plan(
    connection: Connection,
    kind: str,
    ids: Sequence[int],
    *,
    about: Mapping[str, Any],
    by: str,
    why: str | None,
    rate: float | None = None,
) -> int:
    """Keep which dead letters are meant, before anything is done; the operation's number.

    Args:
        connection: Where it is written.
        kind: `replay` or `discard`.
        ids: `MOST` of them at most.
        about: The filter that found them.
        by: Who asks for it.
        why: And why.
        rate: How many per second at most.
    """
    if not 0 < len(ids) <= MOST:
        raise ValueError(f"an operation has from 1 to {MOST} dead letters")
    await connection.execute(_FORGET)
    number: int = await connection.fetchval(_PLAN, kind, *_words(about, by, why), list(ids), rate)
    return number


def _words(about: Mapping[str, Any], by: str, why: str | None) -> tuple[str, str, str | None]:
    cleaned = {name: storable(value) if isinstance(value, str) else value for name, value in about.items()}
    return json.dumps(cleaned, default=str), storable(by), None if why is None else storable(why)


async def take(
    connection: Connection, number: int, *, by: str, why: str | None = None, rate: float | None = None
) -> UUID | None:
    """Begin an operation that is planned, or go on with one that was stopped or interrupted.

    Returns:
        What its steps are taken under; `None` when it is finished, in the hands of another process, or not there.
    """
    runner = uuid4()
    async with connection.transaction():
        row = await connection.fetchrow(_LOCK, number)
        if row is None or not row["free"]:
            return None
        if row["state"] != "planned":
            await record(connection, "resume", {"operation": number}, by=by, why=why)
        await connection.execute(_TAKE, number, runner, rate)
    return runner


async def stop(connection: Connection, number: int, *, by: str, why: str | None = None) -> bool:
    """Let whoever carries it out end before the next batch; whether it was running."""
    async with connection.transaction():
        stopped = await connection.execute(_STOP, number) == "UPDATE 1"
        if stopped:
            await record(connection, "stop", {"operation": number}, by=by, why=why)
    return stopped


async def halt(connection: Connection, number: int, runner: UUID) -> None:
    """Leave it stopped, as whoever carries it out."""
    await connection.execute(f"{_STOP} AND runner = $2", number, runner)


async def next_portion(connection: Connection, number: int, runner: UUID, size: int) -> Portion | None:
    """What to do next, `size` at most, fewer where a rate says so; locked until the transaction ends.

    Returns:
        `None` when it was stopped, is finished, or another process took it.
    """
    row = await connection.fetchrow(_NEXT, number, runner, size)
    if row is None:
        return None
    return Portion(row["kind"], row["asked_by"], row["why"], row["rate"], row["total"], row["dealt"], row["ids"])


async def count(connection: Connection, number: int, runner: UUID, done: int, refused: Sequence[int]) -> None:
    """Count a batch in the transaction that dealt with it."""
    await connection.execute(_COUNT, number, runner, done, list(refused))


async def touch(connection: Connection, number: int, runner: UUID) -> bool:
    """Say that its process is there; whether the operation is still its own, and not stopped."""
    return await connection.fetchrow(_TOUCH, number, runner) is not None


async def load(connection: Connection, number: int) -> Operation | None:
    """The operation of this number."""
    row = await connection.fetchrow(_LOAD, number) if number < 2**63 else None
    return None if row is None else _operation(row)


async def latest(connection: Connection, limit: int, *, unfinished: bool = False) -> list[Operation]:
    """Replays and discards that were begun, the latest first; only those that are not finished, if so asked."""
    return [_operation(row) for row in await connection.fetch(_LIST, limit, unfinished)]


def _operation(row: asyncpg.Record) -> Operation:
    return Operation(**{**row, "about": json.loads(row["about"])})
