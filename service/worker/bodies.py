"""What is believed of a body in the broker, which anyone who reaches the broker may have written.

What must stay true: a delivery of the ledger runs by its own actor's options, whatever the body says. Dramatiq takes
an option of the message before the actor's: a time limit of its own cuts a run short, a callback sends another message,
and an `eta` parks it in the worker's memory, where a few of them leave no room to fetch anything else. And nothing in a
body ends a thread, also where a plain actor runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.ledger.message import OF_LEDGER, OPTIONS

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy
    from dramatiq.message import Message

_DEEPEST = 50
"""Levels of lists and objects: what could just be decoded may be too deep to be encoded or shown."""


def can_run(message: Message[Any] | MessageProxy, queue: str) -> bool:
    """Whether a thread that was handed this message from `queue` would survive it, and log none of it."""
    fields: dict[str, Any] = message.asdict()
    return (
        # Dramatiq looks the queue's consumer up by this name; a wrong one ends the thread for good.
        fields["queue_name"] == queue
        and isinstance(fields["actor_name"], str)
        and isinstance(fields["kwargs"], dict)
        and isinstance(fields["options"], dict)
        and isinstance(fields["message_id"], str)
        and not _deeper_than(_DEEPEST, [fields["args"], fields["kwargs"], fields["options"]])
        and _is_priority(fields["options"].get("broker_priority"))
    )


def _is_priority(value: Any) -> bool:
    """Whether RabbitMQ's client can send a delayed message on with it."""
    return value is None or (type(value) is int and 0 <= value <= 255)


def _deeper_than(levels: int, value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return False
    return levels < 0 or any(_deeper_than(levels - 1, each) for each in value)


def disarm(message: Message[Any] | MessageProxy, broker: Broker) -> None:
    """Take from a message that can run the options that it may not have.

    An actor that this process does not know may be a plain one of another's, so its delay is kept.
    """
    delayed = message.queue_name.endswith(".DQ")
    actor = broker.actors.get(message.actor_name)
    of_ledger = not delayed if actor is None else actor.options.get(OF_LEDGER, False)
    if of_ledger:
        for name in message.options.keys() - OPTIONS:
            del message.options[name]
        return
    message.options.pop("throws", None)  # no text is a class: Dramatiq's comparison would end the thread
    if not delayed:
        message.options.pop("eta", None)
