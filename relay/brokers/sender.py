"""What the relay needs of a broker: hand over a batch, and say who is at fault when that fails.

A failure is never the delivery's. `BrokerUnavailableError` concerns every queue: the relay rolls back and waits. A
`QueueRefusedError` concerns one: the others go on. Either way nothing is counted against any event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.ledger.message import DueDelivery


class BrokerUnavailableError(ServiceError):
    """The broker cannot be reached or takes nothing at all: down, out of memory, read-only, loading, not logged in."""


class QueueRefusedError(ServiceError):
    """The broker is fine but this queue takes nothing: missing, of another type or with other arguments."""


def reason_of(error: BaseException) -> str:
    """What a client's error says, for one of these."""
    return (str(error) or type(error).__name__)[:200]


class Sender(Protocol):
    """A broker connection that is made when it is first used and made anew after an error."""

    async def hand_over(self, queue: str, batch: Sequence[DueDelivery], transaction: str) -> int:
        """Hand over a batch and return how many messages then wait in the queue.

        Args:
            queue: The Dramatiq queue.
            batch: Deliveries of this queue.
            transaction: New for every relay transaction: within one, a repeated hand-over is queued once.

        Raises:
            BrokerUnavailableError, QueueRefusedError: nothing may be assumed to have been queued.
        """

    async def depth(self, queue: str) -> int:
        """How many messages wait in the queue; one that is missing may be created."""

    async def inspect(self, queue: str) -> int | None:
        """How many messages wait in the queue, `None` if there is no such queue. Nothing is created.

        Raises:
            BrokerUnavailableError, QueueRefusedError: it would not take messages.
        """

    async def ping(self) -> None:
        """Return if the broker would take messages now; raise `BrokerUnavailableError` if not."""

    async def close(self) -> None:
        """End the connection."""
