"""Replaying and discarding dead letters.

What must stay true: a dead letter is resolved exactly once, and never without its effect. So a replay writes the row
back, under its old id and with a fresh budget, in the statement that marks the dead letter, and that statement takes
only open dead letters: of two replays at once one wins, and one that is interrupted loses nothing. The dead letter
stays as the record of who did it, when and why. One that blocks its lane goes back to its old place there, any other
to the end; the lanes are locked all at once.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from uuid import UUID

    from service.database.driver import Connection

Action = Literal["replay", "discard"]

BATCH = 200
"""Dead letters resolved in one transaction."""

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
    SELECT id, lane FROM dead_letter WHERE id = ANY($1) AND resolution IS NULL ORDER BY id FOR UPDATE
)
UPDATE dead_letter
SET resolution = 'discarded', resolved_at = clock_timestamp(), resolved_by = $2, resolved_why = $3
FROM locked WHERE dead_letter.id = locked.id
RETURNING dead_letter.id, outbox_lock_lanes(ARRAY(SELECT lane FROM locked WHERE lane IS NOT NULL))
"""

_REFUSED = """
SELECT id, message_id, event_id, resolution, resolved_by, resolved_at FROM dead_letter WHERE id = ANY($1)
"""


@dataclass(slots=True)
class Headway:
    """How far a command came."""

    done: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    interrupted: bool = False


async def resolve(
    connection: Connection,
    action: Action,
    ids: Sequence[int],
    *,
    by: str,
    why: str | None,
    rate: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Headway:
    """Replay or discard, in short transactions. Cancelled, it finishes the one it is in and says how far it came.

    Args:
        connection: Outside a transaction.
        action: What to do with them.
        ids: Which ones; those that are not open any more are left alone.
        by: Who does it, for the record.
        why: And why.
        rate: How many per second at most.
        progress: Called with the number dealt with so far.
    """
    headway = Headway()
    size = BATCH if rate is None else max(1, min(BATCH, int(rate / 4)))
    by, why = storable(by), None if why is None else storable(why)
    clock = asyncio.get_running_loop().time
    started = clock()
    for begin in range(0, len(ids), size):
        batch = list(ids[begin : begin + size])
        statement = asyncio.ensure_future(connection.fetch(_REPLAY if action == "replay" else _DISCARD, batch, by, why))
        try:
            rows = await asyncio.shield(statement)
        except asyncio.CancelledError:
            rows = await statement
            headway.interrupted = True
        done = {row["id"] for row in rows}
        headway.done += sorted(done)
        headway.refused += [each for each in batch if each not in done]
        progress(begin + len(batch))
        if rate is not None and begin + len(batch) < len(ids) and not headway.interrupted:
            try:
                await asyncio.sleep(started + (begin + len(batch)) / rate - clock())
            except asyncio.CancelledError:
                headway.interrupted = True
        if headway.interrupted:
            break
    return headway


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
