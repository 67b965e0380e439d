"""Cancelling what has not begun, in the caller's transaction.

What must stay true: a delivery is cancelled or it is run, never both. The update matches the states it comes from, so
it waits for a claim that is under way and finds the delivery running; and a claim that comes later waits for the
caller's commit, and finds it completed. What became of them all is looked at in a second statement, since the first one
does not see a claim that it has waited for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from service.ledger.follow_ups import THEN
from service.ledger.ids import FAN_OUT, last_delivery_of

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

CANCELLED = "cancelled"
"""In `ended_as`."""

# Before the row's own lock: whoever ends a row of a lane locks first the lane, and then the row whose turn comes.
_LOCK_LANES = text("""
SELECT outbox_lock_all_lanes(lane) FROM outbox_message WHERE id > :event_id AND id <= :last AND lane IS NOT NULL
""")

_SET = f"SET state = 'completed', completed_at = clock_timestamp(), ended_as = '{CANCELLED}'"

# What was to follow the event goes with it. Where that has come due already, nothing of the event was open.
_CANCEL = text(f"""
WITH cancelled AS (
    UPDATE outbox_message {_SET}
    WHERE id > :event_id AND id <= :last AND (state || '') IN ('pending', 'dispatched')
    RETURNING overlay(headers ->> '{THEN}' PLACING 'ff' FROM 35)::uuid AS follow_up
)
UPDATE outbox_message {_SET}
WHERE id = ANY (ARRAY(SELECT follow_up FROM cancelled)) AND (state || '') = 'pending' AND due_at = outbox_parked()
""")  # noqa: S608

_ALL_CANCELLED = text(f"""
SELECT (SELECT coalesce(bool_and(coalesce(ended_as, '') = '{CANCELLED}'), false)
        FROM outbox_message WHERE id > :event_id AND id <= :last
          AND (consumer <> '{FAN_OUT}' OR state <> 'completed' OR ended_as IS NOT NULL))
       AND NOT EXISTS (SELECT FROM dead_letter
                       WHERE message_id > :event_id AND message_id <= :last AND resolution IS NULL)
""")  # noqa: S608


async def cancel_open(session: AsyncSession, event_id: UUID) -> bool:
    """End the event's deliveries that no worker has begun; whether all of its deliveries are cancelled now."""
    reach = {"event_id": event_id, "last": last_delivery_of(event_id)}
    await session.execute(_LOCK_LANES, reach)
    await session.execute(_CANCEL, reach)
    return bool(await session.scalar(_ALL_CANCELLED, reach))
