"""Replaying and discarding dead letters.

What must stay true: a dead letter is resolved exactly once, and never without its effect. So a replay writes the row
back, under its old id and with a fresh budget, in the statement that marks the dead letter, and that statement takes
only open dead letters: of two replays at once one wins, and one that is interrupted loses nothing. The dead letter
stays as the record of who did it, when and why. One that blocks its lane goes back to its old place there, any other
to the end; the lanes are locked all at once, and so is what follows the events of those that are discarded.

However many there are, they are an operation (`operations.py`): each step resolves a batch of its dead letters and
counts them in one transaction, so an operation that died with its process says what was done, and goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from service.ledger import operations

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

    from service.database.driver import Connection

T = TypeVar("T")

Action = Literal["replay", "discard"]

BATCH = 200
"""Dead letters resolved in one transaction."""

REST = 2.0
"""Seconds between two looks of an operation that waits for its rate: it shows that it is there, or was stopped."""

# Rows are locked in one order, so that two commands at once wait for each other instead of deadlocking; who waited
# sees the other's resolution and takes what is left. The insert's trigger wakes a sleeping relay.
_REPLAY = """
WITH locked AS (
    SELECT * FROM dead_letter WHERE id = ANY($1) AND resolution IS NULL ORDER BY id FOR UPDATE
), chosen AS (
    SELECT DISTINCT ON (message_id) * FROM locked ORDER BY message_id, id DESC
), inserted AS (
    INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, created_at,
                                lane, position, due_at)
    SELECT message_id, event_id, event_type, version, consumer, queue, payload,
           headers || jsonb_build_object('due_after', extract(epoch FROM clock_timestamp() - created_at)::text),
           created_at, lane, CASE WHEN blocks THEN position END,
           CASE WHEN lane IS NULL THEN clock_timestamp() ELSE outbox_parked() END
    FROM chosen ORDER BY id
    ON CONFLICT (id) DO NOTHING
    RETURNING id
)
UPDATE dead_letter
SET resolution = 'replayed', resolved_at = clock_timestamp(), resolved_by = $2, resolved_why = $3
FROM chosen JOIN inserted ON inserted.id = chosen.message_id
WHERE dead_letter.id = chosen.id
RETURNING dead_letter.id, outbox_lock_lanes(ARRAY(SELECT lane FROM locked WHERE lane IS NOT NULL))
"""
_DISCARD = """
WITH locked AS (
    SELECT id, lane, headers FROM dead_letter WHERE id = ANY($1) AND resolution IS NULL ORDER BY id FOR UPDATE
)
UPDATE dead_letter
SET resolution = 'discarded', resolved_at = clock_timestamp(), resolved_by = $2, resolved_why = $3
FROM locked WHERE dead_letter.id = locked.id
RETURNING dead_letter.id, outbox_lock_lanes(ARRAY(SELECT lane FROM locked WHERE lane IS NOT NULL)),
          CASE WHEN dead_letter.headers ? 'then'
          THEN outbox_lock_follow_ups(ARRAY(SELECT headers ->> 'then' FROM locked)) END
"""

_REFUSED = """
SELECT id, message_id, event_id, resolution, resolved_by, resolved_at FROM dead_letter WHERE id = ANY($1)
"""


@dataclass(slots=True)
class Headway:
    """How far an operation came, in the hands of one process; it has the number 0 where there was nothing to do."""

    operation: int
    done: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    interrupted: bool = False
    stopped: bool = False
    """By somebody else, or another process has taken it."""


async def resolve(
    connection: Connection,
    action: Action,
    ids: Sequence[int],
    *,
    by: str,
    why: str | None,
    about: Mapping[str, Any] = MappingProxyType({}),
    rate: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Headway:
    """Replay or discard them: an operation that is planned, and carried out at once.

    Args:
        connection: Outside a transaction.
        action: What to do with them.
        ids: Which ones, `operations.MOST` at most; those that are not open any more are left alone.
        by: Who does it, for the record.
        why: And why.
        about: The filter that found them.
        rate: How many per second at most.
        progress: As for `carry_out`.
    """
    if not ids:
        return Headway(0)
    number = await operations.plan(connection, action, ids, about=about, by=by, why=why, rate=rate)
    runner = await operations.take(connection, number, by=by)
    assert runner is not None
    return await carry_out(connection, number, runner, progress=progress)


async def carry_out(
    connection: Connection, number: int, runner: UUID, *, progress: Callable[[int], None] = lambda _: None
) -> Headway:
    """Go on with an operation, in short transactions, until all of it is done or somebody stops it.

    Cancelled, it finishes the transaction it is in, leaves the operation stopped, and says how far it came.

    Args:
        connection: Outside a transaction.
        number: Of the operation.
        runner: What `operations.take` gave for it.
        progress: Called with the number dealt with so far, by whomever.
    """
    headway = Headway(number)
    clock = asyncio.get_running_loop().time
    started, dealt = clock(), 0
    while True:
        step, headway.interrupted = await _to_its_end(_step(connection, number, runner))
        if step is None:
            headway.stopped = not headway.interrupted
            break
        headway.done += step.done
        headway.refused += step.refused
        progress(step.dealt)
        dealt += len(step.done) + len(step.refused)
        if step.dealt >= step.total:
            headway.interrupted = False
            break
        if step.rate is not None and not headway.interrupted:
            rest = _rest(connection, number, runner, started + dealt / step.rate)
            headway.interrupted = await _is_cancelled(rest)
        if headway.interrupted:
            await operations.halt(connection, number, runner)
            break
    return headway


@dataclass(frozen=True, slots=True)
class _Step:
    """What became of a batch; `dealt` of `total` are behind it."""

    done: Sequence[int]
    refused: Sequence[int]
    dealt: int
    total: int
    rate: float | None


async def _step(connection: Connection, number: int, runner: UUID) -> _Step | None:
    async with connection.transaction():
        portion = await operations.next_portion(connection, number, runner, BATCH)
        if portion is None:
            return None
        statement = _REPLAY if portion.kind == "replay" else _DISCARD
        done = {row["id"] for row in await connection.fetch(statement, portion.ids, portion.by, portion.why)}
        refused = [each for each in portion.ids if each not in done]
        await operations.count(connection, number, runner, len(done), refused)
    return _Step(sorted(done), refused, portion.dealt + len(portion.ids), portion.total, portion.rate)


async def _rest(connection: Connection, number: int, runner: UUID, until: float) -> None:
    """Wait until then, by the loop's clock, and show meanwhile that somebody does."""
    clock = asyncio.get_running_loop().time
    while (left := until - clock()) > REST:
        await asyncio.sleep(REST)
        if not await operations.touch(connection, number, runner):
            return
    await asyncio.sleep(left)


async def _to_its_end(work: Coroutine[Any, Any, T]) -> tuple[T, bool]:
    """What it returns, and whether somebody wanted to cancel it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task), False
    except asyncio.CancelledError:
        return await task, True


async def _is_cancelled(wait: Coroutine[Any, Any, None]) -> bool:
    try:
        await wait
    except asyncio.CancelledError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A dead letter was left alone, for somebody had dealt with it."""

    resolution: str
    by: str
    at: datetime


@dataclass(frozen=True, slots=True)
class StaysOpen:
    """A dead letter was left alone, for its delivery is in the ledger already."""

    delivery_id: UUID
    event_id: UUID


Refusal = Resolved | StaysOpen | None
"""Why a dead letter was left alone; `None` when there is none of that number."""


async def refusals(connection: Connection, ids: Sequence[int]) -> dict[int, Refusal]:
    """Why these were left alone."""
    found: dict[int, Refusal] = dict.fromkeys(ids)
    for number, delivery_id, event_id, resolution, by, at in await connection.fetch(_REFUSED, list(ids)):
        found[number] = Resolved(resolution, by, at) if resolution else StaysOpen(delivery_id, event_id)
    return found
