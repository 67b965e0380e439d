"""What is done about an order after the request. Each consumer opens its own session from the ids it is passed."""

from __future__ import annotations

from datetime import UTC

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from service import mail
from service.domains.orders.events import OrderConfirmed, OrderPlaced, OrderRejected
from service.domains.orders.models import DailySales, Order, OrderStatus, Product
from service.outbox import Delivery, Fail, consumer, publish


@consumer(OrderPlaced, queue="stock")
async def reserve_stock(event: OrderPlaced, delivery: Delivery) -> None:
    """Take the stock for an order, or reject it; either is published in the same transaction."""
    async with delivery.begin() as session:
        order = await session.get_one(Order, event.order_id, with_for_update=True)
        if order.status != OrderStatus.PLACED:
            return  # it was decided before: nothing to do
        # Everyone locks in the order of the ids, so two orders for the same products wait rather than deadlock. The key
        # is left out of the lock: an order that is being placed holds it through its lines' foreign key, in any order.
        wanted = select(Product).where(Product.id.in_([line.product_id for line in order.lines])).order_by(Product.id)
        products = {each.id: each for each in await session.scalars(wanted.with_for_update(key_share=True))}
        if any(products[line.product_id].stock < line.quantity for line in order.lines):
            order.status = OrderStatus.REJECTED
            publish(session, OrderRejected(order_id=order.id))
            return
        for line in order.lines:
            products[line.product_id].stock -= line.quantity
        order.status = OrderStatus.CONFIRMED
        publish(session, OrderConfirmed(order_id=order.id))


@consumer(OrderPlaced, queue="stock")
async def count_sales(event: OrderPlaced, delivery: Delivery) -> None:
    """Count the order for its day: a second delivery of the same event, with retries of its own."""
    async with delivery.begin() as session:
        order = await session.get_one(Order, event.order_id)
        row = insert(DailySales).values(day=order.created_at.astimezone(UTC).date(), orders=1)
        await session.execute(row.on_conflict_do_update(index_elements=["day"], set_={"orders": DailySales.orders + 1}))


@consumer(OrderConfirmed, queue="email", max_retries=8)
async def send_confirmation(event: OrderConfirmed, delivery: Delivery) -> None:
    """Tell the customer that the order is confirmed."""
    await _send(event, delivery, "is confirmed", "Thank you for your order. It is confirmed.")


@consumer(OrderRejected, queue="email", max_retries=8)
async def send_rejection(event: OrderRejected, delivery: Delivery) -> None:
    """Tell the customer that the stock did not suffice."""
    await _send(event, delivery, "cannot be fulfilled", "We are sorry: what you ordered is out of stock.")


async def _send(event: OrderConfirmed | OrderRejected, delivery: Delivery, outcome: str, text: str) -> None:
    async with delivery.read() as session:
        order = await session.get_one(Order, event.order_id)
    # No transaction is open while the mail server takes its time. The delivery is completed on return; a crash before
    # that sends the e-mail again, under the same Message-ID.
    try:
        await mail.send(order.email, f"Order {order.id} {outcome}", text, idempotency_key=delivery.idempotency_key)
    except mail.MailRefusedError as refusal:
        raise Fail(f"the mail server refused the e-mail for good: {refusal}") from refusal
