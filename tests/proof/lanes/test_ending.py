"""A lane goes on without what is cancelled or has expired."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from service.database.sessions import transaction
from service.errors import PublishError
from service.outbox import cancel, publish, publish_all
from tests.proof.lanes import domain
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from tests.proof.lanes.conftest import Lanes


def changed(note: str) -> domain.Changed:
    return domain.Changed(thing="x", note=note)


async def cancelled(lanes: Lanes, note: str) -> bool:
    async with transaction(lanes.sessions) as session:
        return await cancel(session, (await lanes.delivery(note))["event_id"])


@pytest.mark.parametrize(("gone", "left"), [("a", "bc"), ("b", "ac"), ("c", "ab")])
async def test_it_goes_on_without_what_is_cancelled(lanes: Lanes, gone: str, left: str) -> None:
    await lanes.publish_all(changed(note) for note in "abc")
    assert await cancelled(lanes, gone)
    assert await lanes.unparked() == [left[0]]
    await lanes.run()
    assert await lanes.steps("x") == left


async def test_it_goes_on_without_what_has_expired(lanes: Lanes) -> None:
    async with transaction(lanes.sessions) as session:
        publish(session, changed("a"), expires=timedelta(minutes=1))
        publish_all(session, [changed("b")], expires=timedelta(minutes=1))
    await lanes.publish_all([changed("c")])
    await lanes.sql("UPDATE outbox_message SET expires_at = created_at WHERE expires_at IS NOT NULL")
    await lanes.run()
    assert await lanes.steps("x") == "c"


async def test_who_replaces_an_event_and_who_ends_the_one_before_wait_in_one_order(lanes: Lanes) -> None:
    """Each would wait for the other, if the canceller locked the row first and its lane at its commit."""
    await lanes.publish_all(changed(note) for note in "ab")
    head, second = await lanes.delivery("a"), await lanes.delivery("b")
    async with transaction(lanes.sessions) as session:
        assert await cancel(session, second["event_id"])
        run = asyncio.create_task(lanes.runner.deliver(head["id"]))
        await until(lambda: blocked(lanes))
        publish(session, changed("c"))
    await run
    assert (await lanes.delivery("a"))["attempts"] == 1
    await lanes.run()
    assert await lanes.steps("x") == "ac"


async def test_what_is_in_order_cannot_stand_for_what_comes_later(lanes: Lanes) -> None:
    async with transaction(lanes.sessions) as session:
        with pytest.raises(PublishError, match="runs in order"):
            publish(session, changed("a"), unique=True)
