"""What can be told from an id: they are UUIDs v7, and an event's deliveries follow it, numbered in the last byte.

So ids are in the order of time, and all deliveries of an event are one range of the primary key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from datetime import datetime


def event_of(delivery_id: UUID) -> UUID:
    """The id of the event that this delivery belongs to; an event's own stays as it is."""
    return UUID(int=delivery_id.int & ~0xFF)


def last_delivery_of(event_id: UUID) -> UUID:
    """The greatest id that a delivery of this event can have."""
    return UUID(int=event_id.int | 0xFF)


def first_id_after(moment: datetime) -> UUID:
    """The least UUID v7 of that millisecond; the least of all for one before 1970."""
    return UUID(int=max(int(moment.timestamp() * 1000), 0) << 80)
