"""Keys take turns: what one has a backlog of holds up no other, and no step reads that backlog."""

from __future__ import annotations

import json
import random
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from relay.process.relay_session import SESSION
from service.database.driver import bound_waits
from service.database.sessions import transaction
from service.errors import ConsumerDefinitionError, PublishError
from service.ledger import delivering, limiting, sharing
from service.ledger.dispatching import NO_FLOOR, Pauses
from service.ledger.limited_dispatching import take_limited
from service.ledger.sharing import Shares, take_shared
from service.outbox import Delivery, Event, consumer, publish
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

PAUSES = Pauses(timedelta(seconds=60), timedelta(seconds=10), timedelta(seconds=60))
HOW: tuple[Any, ...] = (PAUSES.redispatch_after, True, PAUSES.min_backoff, PAUSES.max_backoff, "shares", [])
"""What a relay hands a turn over with, beside the turn."""

MANY = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, due_at)
SELECT id, id, 'shares.sent', 1, 'shares.send', 'shares', '{}', '{"share": "hot"}', now() - interval '1 hour'
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1)) AS new
"""
ONE = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT id, id, 'shares.sent', 1, 'shares.send', 'shares', '{}',
       CASE WHEN $1 = '' THEN '{}' ELSE jsonb_build_object('share', $1::text) END
FROM (SELECT gen_random_uuid() AS id) AS new RETURNING id
"""
KEY_OF = "SELECT headers ->> 'share' FROM outbox_message WHERE id = $1"
BY_KEY = """
SELECT headers ->> 'share' AS key, count(*) AS count FROM outbox_message WHERE state = 'dispatched' GROUP BY key
"""


class Sent(Event, type="shares.sent"):
    tenant: str | None
    text: str = ""


@consumer(Sent, queue="shares", name="shares.send", share_by="tenant")
async def send(_event: Sent, _delivery: Delivery) -> None:
    """Nothing to do."""


@consumer(Sent, queue="shares", name="shares.count")
async def count(_event: Sent, _delivery: Delivery) -> None:
    """Takes no turns."""


class Relay:
    """A relay's hand, which the test leads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.shares = Shares("shares")

    async def look(self) -> None:
        await self.shares.look(self.connection)

    async def over(self, most: int) -> list[str]:
        """The keys of what it hands over, in a transaction of its own."""
        async with self.connection.transaction():
            batch = await take_shared(
                self.connection, "shares", self.shares, NO_FLOOR, most, PAUSES, expired_leases=True
            )  # fmt: skip
        return [] if batch is None else await self.keys([UUID(each.delivery_id) for each in batch.deliveries])

    async def limited(self, most: int = 100) -> list[UUID]:
        """What it hands over of a limited queue."""
        async with self.connection.transaction():
            batch, _ = await take_limited(
                self.connection, "shares", NO_FLOOR, most, PAUSES, expired_leases=True, shares=self.shares
            )
        return [] if batch is None else [UUID(each.delivery_id) for each in batch.deliveries]

    async def keys(self, ids: list[UUID]) -> list[str]:
        return sorted([await self.connection.fetchval(KEY_OF, each) or "" for each in ids])


@pytest.fixture
async def relay(connect: Connect) -> Relay:
    return await another(connect)


async def another(connect: Connect) -> Relay:
    connection = await connect()
    await bound_waits(connection, **SESSION)
    return Relay(connection)


async def write(ledger: Ledger, keys: str) -> list[UUID]:
    """A delivery for each letter; a dot stands for one without a key."""
    return [await ledger.connection.fetchval(ONE, key.strip(".")) for key in keys]


async def test_a_turn_is_as_long_for_each_key(ledger: Ledger, relay: Relay) -> None:
    await write(ledger, "..aaaaaaaabbbc")
    await relay.look()
    assert await relay.over(6) == list("aabbc")
    assert await relay.over(6) == ["", ""]
    assert await relay.over(6) == list("aaab")
    assert await relay.over(6) == list("aaa")
    assert await relay.over(6) == []


async def test_after_a_look_it_goes_on_with_whose_turn_is_next(ledger: Ledger, relay: Relay) -> None:
    await write(ledger, "....aaaabbbbcccc")
    seen = []
    for _ in range(8):
        await relay.look()
        seen += await relay.over(1)
    assert seen == ["a", "b", "c", "", "a", "b", "c", ""]


async def test_what_is_left_over_at_a_look_has_its_turn_after_the_next_one(
    ledger: Ledger, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MOST", 2)
    later = await write(ledger, "abcdef")
    await write(ledger, "g.")
    for id_ in later:
        await ledger.connection.execute(
            "UPDATE outbox_message SET due_at = now() + interval '1 hour' WHERE id = $1", id_
        )
    seen: list[str] = []
    for _ in range(8):
        await relay.look()
        if relay.shares._keys:
            seen += await relay.over(1)
    assert seen == ["g", ""]


async def test_two_relays_hand_over_each_delivery_once(ledger: Ledger, relay: Relay, connect: Connect) -> None:
    dice = random.Random(7)
    keys = "".join(dice.choices("abcdefg.", weights=[100, 20, 5, 5, 3, 2, 1, 10], k=120))
    await write(ledger, keys)
    relays = [relay, await another(connect)]
    seen: list[str] = []
    while len(seen) < len(keys):
        each = dice.choice(relays)
        if dice.random() < 0.3:
            await each.look()
        seen += await each.over(dice.randrange(1, 20))
    assert "".join(sorted(key or "." for key in seen)) == "".join(sorted(keys))
    assert [await each.over(10) for each in relays] == [[], []]


async def test_what_is_locked_holds_nobody_up(ledger: Ledger, relay: Relay, connect: Connect) -> None:
    held, *_ = await write(ledger, "aab")
    other = await connect()
    async with other.transaction():
        await other.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", held)
        await relay.look()
        assert await relay.over(10) == ["a", "b"]
        assert await relay.over(10) == []
    await relay.look()
    assert await relay.over(10) == ["a"]


async def test_the_slots_of_a_limited_queue_go_round(ledger: Ledger, relay: Relay, connect: Connect) -> None:
    await write(ledger, ".aaaab")
    await limiting.limit(ledger.connection, "shares", 1, None, None, by="test", why=None)
    worker, seen = await connect(), []
    for _ in range(6):
        await relay.look()
        [id_] = await relay.limited()
        assert await relay.limited() == []
        claimed = await delivering.claim(worker, id_, uuid4(), timedelta(seconds=30))
        assert claimed is not None
        assert await delivering.complete(worker, claimed)
        seen += await relay.keys([id_])
    assert seen == ["a", "b", "", "a", "a", "a"]


async def test_one_that_is_due_again_keeps_its_slot(ledger: Ledger, relay: Relay) -> None:
    await write(ledger, "aab")
    await limiting.limit(ledger.connection, "shares", 2, None, None, by="test", why=None)
    await relay.look()
    first = set(await relay.limited())
    assert await relay.keys(list(first)) == ["a", "b"]
    for each in first:
        await ledger.expire(each)
    await relay.look()
    assert set(await relay.limited()) == first


@pytest.mark.parametrize("analyzed", [False, True])
async def test_a_turn_reads_nothing_of_the_backlog(ledger: Ledger, relay: Relay, *, analyzed: bool) -> None:
    await ledger.connection.execute(MANY, 20_000)
    await write(ledger, "x")
    if analyzed:
        await ledger.connection.execute("ANALYZE outbox_message")
    look = await pages(relay.connection, sharing._KEYS, "shares:", "shares;", 1_000)
    turn = sharing.KeyTurn(["shares:hot", "shares:x"], [NO_FLOOR, NO_FLOOR], 5)
    take = await pages(relay.connection, sharing._TAKE_TURNS, *turn.arguments, *HOW)
    assert look < 30
    assert take < 300
    await relay.look()
    assert (await relay.over(10)).count("x") == 1


async def test_a_turn_does_not_crawl_over_what_was_handed_over(ledger: Ledger, relay: Relay, connect: Connect) -> None:
    """A transaction anywhere in the database keeps the index entries of all rows that were handed over."""
    await ledger.connection.execute(MANY, 6_000)
    other = await connect()
    async with other.transaction(isolation="repeatable_read"):
        await other.execute("SELECT FROM outbox_message LIMIT 1")
        await relay.look()
        relay.shares._keys = ["shares:hot"]
        for _ in range(10):
            assert len(await relay.over(500)) == 500
        turn = relay.shares._next(5)
        assert await pages(relay.connection, sharing._TAKE_TURNS, *turn.arguments, *HOW) < 300


async def pages(connection: Connection, statement: str, *arguments: Any) -> int:
    """How many the statement touches."""
    transaction = connection.transaction()
    await transaction.start()
    explained = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *arguments)
    await transaction.rollback()
    plan = json.loads(explained)[0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


async def test_one_waits_for_no_backlog_of_another(ledger: Ledger, settings: Settings) -> None:
    await ledger.connection.execute(MANY, 5_000)
    [cold] = await write(ledger, "x")
    mine = settings.outbox.model_copy(update={"high_water_mark": 200, "batch_size": 50, "redispatch_after": 600})
    async with relaying(settings.model_copy(update={"outbox": mine})):
        await until(lambda: is_dispatched(ledger, cold))
    handed_over = {row["key"]: row["count"] for row in await ledger.connection.fetch(BY_KEY)}
    assert handed_over["hot"] <= 200


async def is_dispatched(ledger: Ledger, id_: UUID) -> bool:
    return await ledger.state(id_) == "dispatched"


async def test_a_key_stands_in_the_headers_of_whoever_takes_turns(ledger: Ledger) -> None:
    async with transaction(ledger.sessions) as session:
        publish(session, Sent(tenant="t1"))
    rows = await ledger.connection.fetch("SELECT id, consumer, headers ->> 'share' AS key FROM outbox_message")
    assert {row["consumer"]: row["key"] for row in rows} == {"shares.send": "t1", "shares.count": None}
    for row in rows:
        claimed = await delivering.claim(ledger.connection, row["id"], uuid4(), timedelta(seconds=30))
        assert claimed is not None
        assert "share" not in claimed.headers, "what its consumer publishes has a key of its own"


@pytest.mark.parametrize("tenant", [None, "", "x" * 256])
async def test_what_can_be_no_key_is_refused(ledger: Ledger, tenant: str | None) -> None:
    async with transaction(ledger.sessions) as session:
        with pytest.raises(PublishError, match="tenant says whose turn it is"):
            publish(session, Sent(tenant=tenant))


def test_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConsumerDefinitionError, match="share_by='customer' is no field of Sent"):
        consumer(Sent, queue="shares", name="shares.other", share_by="customer")(send)
