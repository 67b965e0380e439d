"""Whoever completes a delivery of a lane claims the next one, past relay and broker, and leaves the rest to them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis.asyncio

from relay.brokers import make_sender
from service.ledger import delivering
from service.ledger.message import DueDelivery
from tests.proof.lanes.domain import Removed, changes
from tests.proof.ledger.looks import sleeping
from tests.servers.processes import Started
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.database.driver import Connection
    from service.outbox.running.runner import Run
    from service.settings import Settings
    from tests.proof.lanes.conftest import Lanes
    from tests.proof.ledger.conftest import Connect

LEASE = timedelta(seconds=30)


async def ended(lanes: Lanes, note: str, *, may_claim_next: bool = True) -> Run:
    """A run of this delivery that is over."""
    run = await lanes.runner.claim((await lanes.delivery(note))["id"])
    assert run is not None
    await lanes.runner.run(run, may_claim_next=lambda: may_claim_next)
    return run


@asynccontextmanager
async def asleep(connect: Connect) -> AsyncIterator[list[str]]:
    """As a relay that sleeps; what it is told meanwhile."""
    relay, told = await connect(), list[str]()
    await relay.add_listener("outbox", lambda *_: told.append("woken"))
    assert await relay.fetchval("SELECT pg_try_advisory_lock(outbox_gate())")
    yield told
    await relay.execute("SELECT pg_advisory_unlock_all()")


async def heard(connection: Connection, told: list[str]) -> int:
    """How often it was woken so far: what is notified now comes after it."""
    await connection.execute("SELECT pg_notify('outbox', '')")
    before = -1
    while before != len(told) or not told:
        before = len(told)
        await connection.execute("SELECT pg_sleep(0.02)")
    return len(told) - 1


async def test_the_next_one_is_claimed_and_no_relay_is_woken(lanes: Lanes, connect: Connect) -> None:
    await lanes.publish_all([*changes("a", "1"), Removed(thing="a", note="2"), *changes("a", "34"), *changes("b", "5")])
    async with asleep(connect) as told:
        run: Run | None = await ended(lanes, "1")
        for note in "234":
            assert run is not None
            run = await lanes.runner.claim_next(run)
            assert run is not None
            row = await lanes.delivery(note)
            assert (run.claim.id, row["state"], row["attempts"], row["dispatches"]) == (row["id"], "running", 1, 0)
            await lanes.runner.run(run, may_claim_next=lambda: True)
        assert run is not None
        assert await lanes.runner.claim_next(run) is None
        assert await heard(lanes.connection, told) == 0
    assert await lanes.steps("a") == "1234"


async def test_after_an_effect_outside_too(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="outside"), *changes("a", "2")])
    following = await lanes.runner.claim_next(await ended(lanes, "1"))
    assert following is not None
    await lanes.runner.run(following)
    assert await lanes.steps("a") == "2"


async def test_where_nobody_will_claim_it_a_relay_is_woken(lanes: Lanes, connect: Connect) -> None:
    await lanes.publish_all(changes("a", "12"))
    async with asleep(connect) as told:
        assert await lanes.runner.claim_next(await ended(lanes, "1", may_claim_next=False)) is None
        assert await heard(lanes.connection, told) == 1
    assert (await lanes.delivery("2"))["state"] == "pending"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE outbox_message SET queue = 'other' WHERE payload ->> 'note' = '2'",
        "UPDATE outbox_message SET consumer = 'lanes.in_a_thread' WHERE payload ->> 'note' = '2'",
        "INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('lanes', 5, 'ada')",
    ],
    ids=["another queue", "not on the loop", "limited"],
)
async def test_what_it_may_not_claim_is_left_to_the_relay(lanes: Lanes, connect: Connect, statement: str) -> None:
    await lanes.publish_all(changes("a", "12"))
    run = await ended(lanes, "1")
    await lanes.sql(statement)
    async with asleep(connect) as told:
        assert await lanes.runner.claim_next(run) is None
        assert await heard(lanes.connection, told) == 1
    row = await lanes.delivery("2")
    assert (row["state"], row["attempts"], row["errors"]) == ("pending", 0, "[]")


async def test_it_does_not_wait_for_whoever_is_at_it(lanes: Lanes, connect: Connect) -> None:
    await lanes.publish_all(changes("a", "12"))
    run, other = await ended(lanes, "1"), await connect()
    async with asleep(connect) as told:
        async with other.transaction():
            await other.execute("SELECT FROM outbox_message WHERE payload ->> 'note' = '2' FOR UPDATE")
            assert await lanes.runner.claim_next(run) is None
        assert await heard(lanes.connection, told) == 1


async def test_what_the_relay_has_handed_over_is_claimed_once(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "12"))
    run = await ended(lanes, "1")
    await lanes.sql("UPDATE outbox_message SET state = 'dispatched', dispatches = 1 WHERE payload ->> 'note' = '2'")
    following = await lanes.runner.claim_next(run)
    assert following is not None
    assert await lanes.runner.claim(following.claim.id) is None
    await lanes.runner.run(following)
    assert await lanes.runner.claim_next(run) is None
    assert await lanes.steps("a") == "12"


async def test_a_claim_whose_answer_was_lost_is_made_again(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "12"))
    run, token = await ended(lanes, "1"), uuid4()
    for _ in range(2):
        claim = await delivering.claim_next(lanes.connection, run.claim, token, LEASE, ["lanes.change"])
        assert claim is not None
        assert claim.attempts == 1
    assert await delivering.claim_next(lanes.connection, run.claim, uuid4(), LEASE, ["lanes.change"]) is None


async def test_a_relay_finds_what_a_worker_that_died_did_not_claim(lanes: Lanes, settings: Settings) -> None:
    await lanes.publish_all(changes("a", "12"))
    outbox = settings.outbox.model_copy(update={"lease": 2.0})
    async with relaying(settings.model_copy(update={"outbox": outbox})):
        await until(lambda: is_dispatched(lanes, "1"))
        await until(lambda: sleeping(lanes))
        await ended(lanes, "1")
        await until(lambda: is_dispatched(lanes, "2"))


async def is_dispatched(lanes: Lanes, note: str) -> bool:
    return bool((await lanes.delivery(note))["dispatches"])


@pytest.mark.slow
async def test_a_lane_leaves_its_slot_after_a_second_and_to_whoever_waits(
    lanes: Lanes, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Nobody relays: what runs beside what was handed over here is what the worker took itself."""
    await lanes.publish_all(changes("a", [str(number) for number in range(300)], how="slow"))
    await lanes.publish_all(changes("b", ["first", "second"]))
    environment["OUTBOX__CONCURRENCY"] = "1"
    command = ("dramatiq", "tests.proof.lanes.app:setup_broker", "-p", "1", "-t", "1")
    worker, sender = Started(environment, tmp_path / "worker.log", *command), make_sender(settings.broker)
    broker = redis.asyncio.Redis.from_url(settings.broker.redis_url)

    async def hand_over(*notes: str) -> None:
        rows = [await lanes.delivery(note) for note in notes]
        await sender.hand_over("lanes", [DueDelivery(str(row["id"]), row["consumer"], None) for row in rows], notes[0])
        await until(lambda: acknowledged())

    async def acknowledged() -> bool:
        return not await broker.hlen(f"{settings.broker.namespace}:lanes.msgs")

    try:
        await until(lambda: worker.says("ready for action"))
        await hand_over("0")
        begun = await done(lanes, "a")
        assert 1 < begun < 300
        assert await lanes.unparked() == [str(begun), "first"]
        await hand_over(str(begun), "first")
        assert await done(lanes, "b") == 2
        assert await done(lanes, "a") < begun + 5
    finally:
        await sender.close()
        await broker.aclose()
        await worker.stop()


async def done(lanes: Lanes, lane: str) -> int:
    count: int = await lanes.connection.fetchval("SELECT count(*) FROM step WHERE lane = $1", lane)
    return count
