"""How ids are made, and what can be told from one.

They are UUIDs v7, and an event's deliveries follow it, numbered in the last byte. So ids are in the order of time, and
all deliveries of an event are one range of the primary key.
"""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from uuid_utils.compat import uuid7

MAX_CONSUMERS = 254
"""Consumers one event type can have: as many deliveries as fit between two event ids, but for that of `FAN_OUT`."""

FAN_OUT = "outbox.fan_out"
"""The consumer of what the database publishes: `service/outbox/fan_out.py`. Its delivery has the number 255."""


def new_id() -> UUID:
    """A UUID v7: unique, and in index order by time. Make it when the object is constructed, not by the database."""
    return uuid7()


def new_event_id() -> UUID:
    """A UUID v7 whose last byte is free for the numbers of its deliveries."""
    return UUID(int=uuid7().int & ~0xFF)


def delivery_id(event_id: UUID, number: int) -> UUID:
    """The id of an event's delivery `number` (from 1): next to the event's id, so one index finds them all."""
    return UUID(int=event_id.int + number)


def event_of(delivery_id: UUID) -> UUID:
    """The id of the event that this delivery belongs to; an event's own stays as it is."""
    return UUID(int=delivery_id.int & ~0xFF)


def last_delivery_of(event_id: UUID) -> UUID:
    """The greatest id that a delivery of this event can have."""
    return UUID(int=event_id.int | 0xFF)


def first_id_after(moment: datetime) -> UUID:
    """The least UUID v7 of that millisecond; the least of all for one before 1970."""
    return UUID(int=max(int(moment.timestamp() * 1000), 0) << 80)


def made_at(id: UUID) -> datetime:  # noqa: A002
    """The millisecond in which a UUID v7 was made, in UTC."""
    return datetime.fromtimestamp((id.int >> 80) / 1000, UTC)
