"""The demo's verdict accuses a system that loses or repeats something, and only that."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from service.dev.demo.example import Load
from service.dev.demo.verdict import Verdict, count, judge
from service.dev.sink import Mail

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.dev.demo.stage import Stage

_STOCK = 10


class _Database:
    """As much of a stage as the verdict reads."""

    def __init__(self, database: asyncpg.Pool[asyncpg.Record]) -> None:
        self.database = database


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2) as pool:
        yield _Database(pool)  # type: ignore[misc]


@pytest.fixture
async def load(stage: Stage) -> Load:
    """Three orders that went well: two confirmed, of two items each, and one rejected."""
    load = Load("http://nowhere", "", 3, stock=_STOCK)
    product = uuid4()
    await stage.database.execute("INSERT INTO product VALUES ($1, 'Tea', $2, now())", product, _STOCK - 4)
    await stage.database.execute("INSERT INTO daily_sales VALUES (current_date, 3)")
    for email, status in (("a@x.org", "confirmed"), ("b@x.org", "confirmed"), ("c@x.org", "rejected")):
        order = uuid4()
        insert = "INSERT INTO customer_order (id, email, status, created_at) VALUES ($1, $2, $3, now())"
        await stage.database.execute(insert, order, email, status)
        line = "INSERT INTO order_line (order_id, product_id, quantity) VALUES ($1, $2, 2)"
        await stage.database.execute(line, order, product)
        load.accepted[email] = str(order)
    return load


def _mail(to: str, message_id: str | None = None, copy: int = 1) -> Mail:
    return Mail("now", message_id or f"<{to}>", "shop@example.com", [to], "Order", copy)


def _mails() -> list[Mail]:
    return [_mail("a@x.org"), _mail("b@x.org"), _mail("c@x.org")]


async def _judge(stage: Stage, load: Load, mails: list[Mail] | None = None) -> Verdict:
    return await judge(stage, load, _mails() if mails is None else mails)


async def test_a_sound_system_passes(stage: Stage, load: Load) -> None:
    verdict = await _judge(stage, load)
    assert verdict == Verdict(lost=[], duplicated=[], mails=3, resent=0)
    assert verdict.passed


async def test_a_copy_under_the_same_message_id_is_no_duplicate(stage: Stage, load: Load) -> None:
    verdict = await _judge(stage, load, [*_mails(), _mail("a@x.org", copy=2)])
    assert verdict.passed
    assert (verdict.mails, verdict.resent) == (3, 1)


@pytest.mark.parametrize(
    "fault",
    [
        "UPDATE customer_order SET status = 'placed' WHERE email = 'c@x.org'",
        "UPDATE daily_sales SET orders = 2",
        "UPDATE product SET stock = stock + 2",
    ],
    ids=["undecided", "not counted", "stock not taken"],
)
async def test_a_lost_effect_is_found(stage: Stage, load: Load, fault: str) -> None:
    await stage.database.execute(fault)
    verdict = await _judge(stage, load)
    assert verdict.lost
    assert not verdict.duplicated


@pytest.mark.parametrize(
    "fault",
    ["UPDATE daily_sales SET orders = 4", "UPDATE product SET stock = stock - 2"],
    ids=["counted twice", "stock taken twice"],
)
async def test_a_repeated_effect_is_found(stage: Stage, load: Load, fault: str) -> None:
    await stage.database.execute(fault)
    verdict = await _judge(stage, load)
    assert verdict.duplicated
    assert not verdict.lost


async def test_an_accepted_order_that_is_not_there_is_lost(stage: Stage, load: Load) -> None:
    load.accepted["d@x.org"] = str(uuid4())
    assert len((await _judge(stage, load)).lost) == 1


async def test_a_missing_e_mail_is_lost(stage: Stage, load: Load) -> None:
    assert len((await _judge(stage, load, _mails()[1:])).lost) == 1


async def test_a_second_e_mail_under_another_message_id_is_a_duplicate(stage: Stage, load: Load) -> None:
    verdict = await _judge(stage, load, [*_mails(), _mail("a@x.org", "<other>")])
    assert len(verdict.duplicated) == 1


async def test_an_order_stored_twice_is_a_duplicate(stage: Stage, load: Load) -> None:
    copy = "INSERT INTO customer_order SELECT gen_random_uuid(), email, status, created_at FROM customer_order LIMIT 1"
    await stage.database.execute(copy)
    await stage.database.execute("UPDATE daily_sales SET orders = 4")
    assert (await _judge(stage, load)).duplicated == ["an order was stored twice"]


async def test_an_open_dead_letter_fails_the_demo(stage: Stage, load: Load) -> None:
    await stage.database.execute(
        "INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, "
        "attempts, dispatches, created_at, errors, reason) "
        "VALUES (gen_random_uuid(), gen_random_uuid(), 'a.b', 1, 'c', 'q', '{}', '{}', 1, 1, now(), '[]', 'test')"
    )
    assert (await count(stage)).dead == 1
    assert not (await _judge(stage, load)).passed
