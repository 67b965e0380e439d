"""Replaying a dead letter with another payload.

What must stay true: no payload that was stored is ever changed. The correction is a delivery of its own, and the dead
letter keeps what died. It has an id of its own too, since that is the idempotency key: under the old one, a receiver
that has seen the mistake would drop the correction.

That id is in the event's range, so that the story and the purge find it; and it never was another delivery's, not even
of one that is purged by now. Consumers are numbered from 1, corrections from `MAX_CONSUMERS` down, and the dead letters
that were edited, which stay, say how many there were.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import OutboxError
from service.ledger import operations
from service.ledger.ids import MAX_CONSUMERS, delivery_id, event_of, last_delivery_of
from service.ledger.replaying import Refusal, Resolved, StaysOpen
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from service.database.driver import Connection

# All dead letters of the event: who edits another of them at the same time waits, and then sees this one.
_LOCK = """
SELECT id, message_id, event_id, resolution, resolved_by, resolved_at FROM dead_letter
WHERE message_id > $1 AND message_id <= $2 ORDER BY id FOR UPDATE
"""
_IN_OUTBOX = "SELECT id FROM outbox_message WHERE id > $1 AND id <= $2"
_INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, created_at,
                            lane, position, due_at)
SELECT $2, event_id, event_type, $3, consumer, queue, $4::text::jsonb,
       headers || jsonb_build_object('due_after', extract(epoch FROM clock_timestamp() - created_at)::text), created_at,
       lane, CASE WHEN blocks THEN position END, CASE WHEN lane IS NULL THEN clock_timestamp() ELSE outbox_parked() END
FROM dead_letter WHERE id = $1
"""
_RESOLVE = """
UPDATE dead_letter
SET resolution = 'edited', resolved_at = clock_timestamp(), resolved_by = $2, resolved_why = $3 WHERE id = $1
"""
_DELIVERY = "SELECT message_id FROM dead_letter WHERE id = $1"


@dataclass(frozen=True, slots=True)
class Edited:
    """The delivery that goes out in a dead letter's place, and the operation that records it."""

    delivery_id: UUID
    event_id: UUID
    operation: int


async def replace(
    connection: Connection,
    number: int,
    payload: Mapping[str, Any],
    version: int,
    *,
    fields: Sequence[str],
    by: str,
    why: str | None,
) -> Edited | Refusal:
    """Close an open dead letter as edited, and publish this in its place, for its consumer alone.

    Args:
        connection: Where it is done.
        number: Of the dead letter.
        payload: What its consumer can read; `outbox/corrections.py` has checked that.
        version: The event's version that the payload is one of.
        fields: The names of those that differ, for the record.
        by: Who does it.
        why: And why.

    Raises:
        OutboxError: the event has no number left for another delivery.
    """
    async with connection.transaction():
        dead: UUID | None = await connection.fetchval(_DELIVERY, number)
        if dead is None:
            return None
        reach = event_of(dead), last_delivery_of(dead)
        letters = {row["id"]: row for row in await connection.fetch(_LOCK, *reach)}
        letter = letters[number]
        if letter["resolution"]:
            return Resolved(letter["resolution"], letter["resolved_by"], letter["resolved_at"])
        present = {row["id"] for row in await connection.fetch(_IN_OUTBOX, *reach)}
        if dead in present:
            return StaysOpen(dead, letter["event_id"])
        taken = present | {row["message_id"] for row in letters.values()}
        edits = sum(row["resolution"] == "edited" for row in letters.values())
        new = _free_id(reach[0], edits, taken)
        await connection.execute(_INSERT, number, new, version, json.dumps(payload))
        await connection.execute(_RESOLVE, number, storable(by), None if why is None else storable(why))
        about = {"dead_letter": number, "fields": list(fields), "delivery": str(new)}
        operation = await operations.record(connection, "edit", about, by=by, why=why)
    return Edited(new, letter["event_id"], operation)


def _free_id(event_id: UUID, edits: int, taken: set[UUID]) -> UUID:
    for place in range(MAX_CONSUMERS - edits, 0, -1):
        if (new := delivery_id(event_id, place)) not in taken:
            return new
    raise OutboxError(f"event {event_id} has {MAX_CONSUMERS} deliveries: replay it as it is, or discard it")
