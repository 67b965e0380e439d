"""What happens to an order. Events carry its id; consumers read the rest as it is by then."""

from __future__ import annotations

from uuid import UUID

from service.outbox import Event


class OrderPlaced(Event, type="order.placed", version=1):
    """A customer placed an order."""

    order_id: UUID


class OrderConfirmed(Event, type="order.confirmed", version=1):
    """The stock for an order was taken."""

    order_id: UUID


class OrderRejected(Event, type="order.rejected", version=1):
    """The stock did not suffice."""

    order_id: UUID
