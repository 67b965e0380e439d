"""What SQL publishes under one key is published in the order of the commits, and not at all without one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from service.database.sessions import transaction
from service.ledger.ids import FAN_OUT
from service.outbox import publish
from tests.proof.lanes.domain import Changed, Seen, changes

if TYPE_CHECKING:
    from uuid import UUID

    from tests.proof.lanes.conftest import Lanes

_PUBLISH = "SELECT outbox_publish('lanes.changed', $1, 'lanes', order_key => $2)"
_FAN_OUTS = f"SELECT id FROM outbox_message WHERE consumer = '{FAN_OUT}' ORDER BY position"


async def published(lanes: Lanes, note: str, key: str | None) -> UUID:
    """The event's id."""
    found: UUID = await lanes.connection.fetchval(_PUBLISH, json.dumps({"thing": "a", "note": note}), key)
    return found


async def test_a_key_keeps_the_order_of_commits(lanes: Lanes) -> None:
    for note in "123":
        await published(lanes, note, "a")
    first, second, third = [row["id"] for row in await lanes.connection.fetch(_FAN_OUTS)]
    for waits in (third, second):  # as a worker that is told of them too early
        await lanes.runner.deliver(waits)
        assert await lanes.state(waits) == "pending"
    await lanes.runner.deliver(first)
    await lanes.run()
    assert await lanes.steps("a") == "123"


async def test_other_keys_do_not_wait(lanes: Lanes) -> None:
    for key in "aab":
        await published(lanes, key, key)
    assert await lanes.unparked() == ["a", "b"]


async def test_what_follows_another_event_enters_the_lane_when_it_is_published(lanes: Lanes) -> None:
    async with transaction(lanes.sessions) as session:
        publish(session, Seen(thing="b", note=""), then=Changed(thing="a", note="2"))
    await lanes.publish_all(changes("a", "1"))
    await lanes.run()
    assert await lanes.steps("a") == "12"


async def test_without_a_key_it_is_a_dead_letter_that_says_so(lanes: Lanes) -> None:
    await published(lanes, "1", None)
    await lanes.run()
    letter = await lanes.letter()
    assert "lanes.change runs in order: discard this, and say order_key" in letter["errors"]
    assert await lanes.steps("a") == ""
