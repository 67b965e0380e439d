"""What is believed of a body in the broker, which anyone who reaches the broker may have written.

What must stay true: a delivery of the ledger runs by its own actor's options, whatever the body says. Dramatiq takes
an option of the message before the actor's: a time limit of its own cuts a run short, a callback sends another message,
and an `eta` parks it in the worker's memory, where a few of them leave no room to fetch anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dramatiq.broker import Broker, MessageProxy
    from dramatiq.message import Message

__all__ = ["OF_LEDGER", "can_run", "disarm"]

OF_LEDGER = "of_ledger"
"""The option that marks an actor whose messages hold nothing but a row's id."""

_WRITTEN_BY_RELAY = {"redis_message_id", "traceparent"}


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
    )


def disarm(message: Message[Any] | MessageProxy, broker: Broker) -> None:
    """Take from a message that can run the options that it may not have.

    An actor that this process does not know may be a plain one of another's, so its delay is kept.
    """
    delayed = message.queue_name.endswith(".DQ")
    actor = broker.actors.get(message.actor_name)
    of_ledger = not delayed if actor is None else actor.options.get(OF_LEDGER, False)
    if of_ledger:
        for name in message.options.keys() - _WRITTEN_BY_RELAY:
            del message.options[name]
    elif not delayed:
        message.options.pop("eta", None)
