"""What relay and worker agree on: the message in the broker, in Dramatiq's own format, with nothing in it but an id.

The relay writes with `encode`; the worker believes no more of a body than what that could have written.

What must stay true: a body equals `dramatiq.Message(...).encode()` of the same fields, to the byte. It is put together
here because that call costs ten times as much, which a batch of hundreds feels.
"""

from __future__ import annotations

import re
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

if TYPE_CHECKING:
    from collections.abc import Sequence

REDIS_ID = "redis_message_id"
"""The option that names the entry in the queue's list; Dramatiq's Redis broker cannot acknowledge without it."""

TRACE = "traceparent"

OPTIONS = frozenset({REDIS_ID, TRACE})
"""Every option that a relay writes."""

OF_LEDGER = "of_ledger"
"""The option that marks an actor whose messages hold nothing but a delivery's id."""

_QUEUE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,99}")


def is_queue_name(text: str) -> bool:
    """Whether a queue may be called so: letters, digits, _ and -, at most 100. Every broker takes these as they are."""
    return _QUEUE.fullmatch(text) is not None


def doorbell(namespace: str, queue: str) -> str:
    """The Redis channel that is published to when a message is pushed onto an empty queue."""
    return f"{namespace}:{queue}.doorbell"


def delivery_in(arguments: Sequence[object]) -> UUID | None:
    """The delivery's id that a body holds as its arguments; `None` if no relay wrote it."""
    try:
        (text,) = arguments
        return UUID(text)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):
        return None


class DueDelivery(NamedTuple):
    """One to hand over; its id as text, and its traceparent where it has one."""

    delivery_id: str
    consumer: str
    trace: str | None


def encode(queue: str, due: DueDelivery, timestamp: int, redis_message_id: str | None = None) -> str:
    """The body for one delivery.

    Args:
        queue: The Dramatiq queue.
        due: The delivery to hand over.
        timestamp: Milliseconds since the epoch.
        redis_message_id: See `REDIS_ID`.
    """
    options, delivery_id = [], quoted(due.delivery_id)
    if redis_message_id is not None:
        options.append(f'"{REDIS_ID}":{quoted(redis_message_id)}')
    if due.trace:
        options.append(f'"{TRACE}":{quoted(due.trace)}')
    return (
        f'{{"queue_name":{quoted(queue)},"actor_name":{quoted(due.consumer)},"args":[{delivery_id}],"kwargs":{{}},'
        f'"options":{{{",".join(options)}}},"message_id":{delivery_id},"message_timestamp":{timestamp}}}'
    )
