"""The consumer that every worker has, for events that the database publishes: by `outbox_publish`, or after others.

The database cannot know who consumes an event, nor whether its fields are right. So there is one delivery of the event,
to this consumer, which publishes the event as `publish` does: with the same id, in the transaction that completes it.
What cannot be published is a dead letter that says why.

What must stay true: nothing that SQL has said is dropped on the way, though this worker's code may be older than what
consumes it; and where events have an order, it is that of the commits that SQL made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import ValidationError

from service.errors import PublishError
from service.ledger.ids import FAN_OUT
from service.ledger.publishing import has_no_order
from service.outbox.consumers import ANY_QUEUE, consumer, consumers_of
from service.outbox.events import AnyEvent
from service.outbox.publish import publish_as

if TYPE_CHECKING:
    from service.outbox.delivery import Delivery
    from service.outbox.events import Event


@consumer(AnyEvent, queue=ANY_QUEUE, name=FAN_OUT, throws=(ValidationError, PublishError))
async def fan_out(event: Event, delivery: Delivery) -> None:
    """Publish it to whoever consumes it now."""
    async with delivery.begin() as session:
        ordered = [each.name for each in consumers_of(type(event)) if each.order is not None]
        if ordered and await has_no_order(session, UUID(delivery.idempotency_key)):
            raise PublishError(f"{ordered[0]} runs in order: discard this, and say order_key => in outbox_publish")
        publish_as(session, delivery.event_id, event)
