"""What becomes of an order: stock, status, e-mails, sales."""

from __future__ import annotations

import asyncio
import random
import socket
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text

from service.dev.sink import Sink, read_mails
from service.domains.orders.events import OrderConfirmed, OrderRejected
from service.outbox.testing import assert_not_published, assert_published

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
    from aiosmtpd.smtp import SMTP, Envelope, Session

    from tests.domains.orders.conftest import Shop

CONFIRMED = """
SELECT sum(quantity) FROM order_line JOIN customer_order ON customer_order.id = order_id WHERE status = 'confirmed'
"""

ERROR = (
    "SELECT errors->0->>'message' FROM outbox_message WHERE consumer = 'orders.send_confirmation' AND state = 'pending'"
)


async def test_stock_is_taken_and_the_order_confirmed(shop: Shop) -> None:
    tea, cups = await shop.add_product(5), await shop.add_product(1)
    order = await shop.order({tea: 2, cups: 1})
    await shop.worker.deliver_all("orders.reserve_stock")
    assert (await shop.get(f"/orders/{order}"))["status"] == "confirmed"
    assert [(await shop.get(f"/products/{id_}"))["stock"] for id_ in (tea, cups)] == [3, 0]
    async with shop.sessions() as session:
        await assert_published(session, OrderConfirmed, order_id=UUID(order))
        await assert_not_published(session, OrderRejected)


async def test_an_order_over_the_stock_is_rejected_whole(shop: Shop) -> None:
    tea, cups = await shop.add_product(5), await shop.add_product(1)
    order = await shop.order({tea: 2, cups: 2})
    await shop.worker.deliver_all("orders.reserve_stock")
    assert (await shop.get(f"/orders/{order}"))["status"] == "rejected"
    assert [(await shop.get(f"/products/{id_}"))["stock"] for id_ in (tea, cups)] == [5, 1]
    async with shop.sessions() as session:
        await assert_published(session, OrderRejected, order_id=UUID(order))
        await assert_not_published(session, OrderConfirmed)


async def test_an_order_that_was_decided_before_is_left_alone(shop: Shop) -> None:
    tea = await shop.add_product(5)
    order = await shop.order({tea: 2})
    async with shop.sessions() as session:
        await session.execute(text(f"UPDATE customer_order SET status = 'rejected' WHERE id = '{order}'"))
        await session.commit()
    await shop.worker.deliver_all("orders.reserve_stock")
    assert (await shop.get(f"/products/{tea}"))["stock"] == 5
    async with shop.sessions() as session:
        await assert_not_published(session, OrderConfirmed)
        await assert_not_published(session, OrderRejected)


async def test_orders_for_the_same_products_neither_deadlock_nor_oversell(shop: Shop) -> None:
    products = [await shop.add_product(10) for _ in range(4)]
    generator = random.Random(1)
    for _ in range(24):
        await shop.order({id_: generator.randint(1, 3) for id_ in generator.sample(products, 3)})
    deliveries = await shop.deliveries("orders.reserve_stock")
    await asyncio.gather(*(shop.worker.runner.deliver(id_) for id_ in deliveries))
    left = [(await shop.get(f"/products/{id_}"))["stock"] for id_ in products]
    assert all(stock >= 0 for stock in left)
    assert 40 - sum(left) == await shop.scalar(CONFIRMED) > 0
    assert len(await shop.deliveries("orders.reserve_stock", "completed")) == 24
    assert await shop.scalar("SELECT max(attempts) FROM outbox_message") == 1  # a deadlock would have cost a retry
    assert await shop.scalar("SELECT count(*) FROM customer_order WHERE status = 'placed'") == 0


async def test_every_order_is_counted_once(shop: Shop) -> None:
    tea = await shop.add_product(100)
    for _ in range(5):
        await shop.order({tea: 1})
    deliveries = await shop.deliveries("orders.count_sales")
    await asyncio.gather(*(shop.worker.runner.deliver(id_) for id_ in deliveries * 3))
    assert await shop.scalar("SELECT sum(orders) FROM daily_sales") == 5
    assert await shop.scalar("SELECT day = (now() AT TIME ZONE 'UTC')::date FROM daily_sales")


async def test_the_customer_gets_an_email(shop: Shop, sink: Path) -> None:
    tea = await shop.add_product(1)
    confirmed = await shop.order({tea: 1}, "ada@example.com")
    rejected = await shop.order({tea: 1}, "bob@example.com")
    await shop.worker.deliver_all()
    [key] = await shop.deliveries("orders.send_confirmation", "completed")
    [other] = await shop.deliveries("orders.send_rejection", "completed")
    assert [(mail.recipients, mail.subject, mail.message_id, mail.sender) for mail in read_mails(sink)] == [
        (["ada@example.com"], f"Order {confirmed} is confirmed", f"<{key}@example.com>", "orders@example.com"),
        (["bob@example.com"], f"Order {rejected} cannot be fulfilled", f"<{other}@example.com>", "orders@example.com"),
    ]


async def test_an_address_refused_for_good_ends_in_the_dead_letters(shop: Shop, sink: Path) -> None:
    await shop.order({await shop.add_product(1): 1}, "refused@example.com")
    await shop.worker.deliver_all(may_fail=True)
    assert read_mails(sink) == []
    assert await shop.scalar("SELECT consumer || ' ' || attempts FROM dead_letter") == "orders.send_confirmation 1"
    reason = await shop.scalar("SELECT reason FROM dead_letter")
    assert "550" in reason
    assert "refused@" not in reason


async def test_a_mail_server_that_is_away_is_tried_again(
    shop: Shop, sink: Path, worker_environment: pytest.MonkeyPatch
) -> None:
    await shop.order({await shop.add_product(1): 1})
    await shop.worker.deliver_all("orders.reserve_stock")
    with worker_environment.context() as away, socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        away.setenv("SMTP__URL", f"smtp://127.0.0.1:{reserved.getsockname()[1]}")
        await shop.worker.deliver_all("orders.send_confirmation", may_fail=True)
    assert "SMTPConnectError" in await shop.scalar(ERROR)
    await shop.worker.make_due()
    await shop.worker.deliver_all("orders.send_confirmation")
    assert len(read_mails(sink)) == 1
    assert await shop.scalar("SELECT count(*) FROM dead_letter") == 0


class _Greylisting(Sink):
    """Refuses every recipient for the time being."""

    async def handle_RCPT(  # noqa: N802
        self, _server: SMTP, _session: Session, _envelope: Envelope, _address: str, _options: list[str]
    ) -> str:
        return "451 4.7.1 Greylisted, please try again later"


async def test_a_temporary_refusal_is_tried_again(
    shop: Shop, tmp_path: Path, worker_environment: pytest.MonkeyPatch
) -> None:
    await shop.order({await shop.add_product(1): 1})
    await shop.worker.deliver_all("orders.reserve_stock")
    async with _Greylisting(tmp_path / "none") as sink:
        worker_environment.setenv("SMTP__URL", f"smtp://127.0.0.1:{await sink.start()}")
        await shop.worker.deliver_all("orders.send_confirmation", may_fail=True)
    assert await shop.scalar(ERROR) == "451 4.7.1 Greylisted, please try again later"
    assert await shop.scalar("SELECT count(*) FROM dead_letter") == 0


class _Latin1(Sink):
    """Refuses every recipient for good, in bytes that are no UTF-8: "Empfänger unbekannt"."""

    async def handle_RCPT(  # type: ignore[override]  # noqa: N802
        self, _server: SMTP, _session: Session, _envelope: Envelope, _address: str, _options: list[str]
    ) -> bytes:
        return b"550 5.1.1 Empf\xe4nger unbekannt"


async def test_a_refusal_in_bytes_that_are_no_text_ends_in_the_dead_letters(
    shop: Shop, tmp_path: Path, worker_environment: pytest.MonkeyPatch
) -> None:
    await shop.order({await shop.add_product(1): 1})
    await shop.worker.deliver_all("orders.reserve_stock")
    async with _Latin1(tmp_path / "none") as sink:
        worker_environment.setenv("SMTP__URL", f"smtp://127.0.0.1:{await sink.start()}")
        await shop.worker.deliver_all("orders.send_confirmation", may_fail=True)
    reason = await shop.scalar("SELECT reason FROM dead_letter")
    assert (
        reason == "the mail server refused the e-mail for good: 550 5.1.1 Empf\N{REPLACEMENT CHARACTER}nger unbekannt"
    )
    assert await shop.scalar("SELECT errors->-1->>'message' FROM dead_letter") == reason
    assert await shop.scalar("SELECT count(*) FROM outbox_message WHERE state <> 'completed'") == 1  # count_sales'
