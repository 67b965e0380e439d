"""The message that a worker gets: Dramatiq's own format, with nothing in it but the row's id.

What must stay true: a body equals `dramatiq.Message(...).encode()` of the same fields, to the byte. It is put together
here because that call costs ten times as much, which a batch of hundreds feels.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii as quoted
from typing import NamedTuple

__all__ = ["Handover", "encode"]


class Handover(NamedTuple):
    """One row to hand over. `id` is the row's, as text; `trace` its traceparent, where it has one."""

    id: str
    consumer: str
    trace: str | None


def encode(queue: str, row: Handover, timestamp: int, redis_message_id: str | None = None) -> str:
    """The body for one row.

    Args:
        queue: The Dramatiq queue.
        row: The row to hand over.
        timestamp: Milliseconds since the epoch.
        redis_message_id: The entry in the queue's list; Dramatiq's Redis broker cannot acknowledge without it.
    """
    options = []
    if redis_message_id is not None:
        options.append(f'"redis_message_id":{quoted(redis_message_id)}')
    if row.trace:
        options.append(f'"traceparent":{quoted(row.trace)}')
    return (
        f'{{"queue_name":{quoted(queue)},"actor_name":{quoted(row.consumer)},"args":[{quoted(row.id)}],"kwargs":{{}},'
        f'"options":{{{",".join(options)}}},"message_id":{quoted(row.id)},"message_timestamp":{timestamp}}}'
    )
