"""What stands in one order takes effect one at a time, in the order of commits, whatever becomes of each."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.database.driver import read_json
from service.database.engine import create_engine
from service.database.sessions import OneTransaction, session_factory, transaction
from service.errors import PublishError
from service.ledger.counting import count, count_queues
from service.ledger.erasing import erase
from service.ledger.purging import purge_step_by_step
from service.ledger.replaying import resolve
from service.outbox import accept, corrections, publish
from service.outbox.testing import inline_worker
from tests.proof.lanes.domain import Changed, Pinged, Removed, Seen, Skipped, changes
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from service.settings import Settings
    from tests.proof.lanes.conftest import Lanes
    from tests.proof.ledger.conftest import Connect

_DONE = "UPDATE outbox_message SET state = 'completed', completed_at = clock_timestamp()"

KINDS = pytest.mark.parametrize("kind", [None, OneTransaction], ids=["plain", "lent"])
"""Sessions that write objects, and those that write statements."""


@KINDS
async def test_a_lane_runs_in_order_across_event_types(
    lanes: Lanes, engine: AsyncEngine, kind: type[AsyncSession] | None
) -> None:
    sessions = session_factory(engine, *filter(None, [kind]))
    async with transaction(sessions) as session:
        publish(session, Changed(thing="a", note="1"))
        publish(session, Removed(thing="a", note="2"))
        publish(session, Changed(thing="a", note="3"))
        publish(session, Changed(thing="b", note="4"))
    assert await lanes.unparked() == ["1", "4"]
    await lanes.publish_all([Removed(thing="a", note="5")])
    await lanes.run(1)
    assert (await lanes.unparked())[0] == "2"
    await lanes.run()
    assert await lanes.steps("a") == "1235"
    assert await lanes.steps("b") == "4"


async def test_what_has_no_order_does_not_wait(lanes: Lanes) -> None:
    await lanes.publish_all([Seen(thing="a", note=note) for note in "123"])
    due = "SELECT consumer FROM outbox_message WHERE due_at <= clock_timestamp() ORDER BY consumer"
    assert [row[0] for row in await lanes.connection.fetch(due)] == ["lanes.glance"] * 3 + ["lanes.see"]
    await lanes.run()
    assert await lanes.steps("a") == "123"


async def test_the_order_is_that_of_commits(lanes: Lanes) -> None:
    async with transaction(lanes.sessions) as session:
        publish(session, Changed(thing="a", note="2"))
        await session.flush()
        await lanes.publish_all(changes("a", "1"))
    await lanes.run()
    assert await lanes.steps("a") == "12"


@KINDS
async def test_what_a_savepoint_undid_takes_no_place(
    lanes: Lanes, engine: AsyncEngine, kind: type[AsyncSession] | None
) -> None:
    async with transaction(session_factory(engine, *filter(None, [kind]))) as session:
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                publish(session, Changed(thing="a", note="undone"))
                await session.flush()
                raise ZeroDivisionError
        async with session.begin_nested():
            publish(session, Changed(thing="a", note="1"))
        publish(session, Changed(thing="a", note="2"))
    assert await lanes.unparked() == ["1"]
    await lanes.run()
    assert await lanes.steps("a") == "12"


async def test_nothing_is_left_of_a_transaction_that_was_rolled_back(lanes: Lanes) -> None:
    with pytest.raises(ZeroDivisionError):
        async with transaction(lanes.sessions) as session:
            publish(session, Changed(thing="a", note="1"))
            await session.flush()
            raise ZeroDivisionError
    await lanes.publish_all(changes("a", "2"))
    assert await lanes.unparked() == ["2"]


async def test_the_lane_waits_for_a_retry(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="fail once"), *changes("a", "2")])
    await lanes.run(1)
    assert await lanes.unparked() == ["1"]
    await lanes.run()
    assert await lanes.steps("a") == "12"


async def test_an_effect_outside_lets_the_next_one_go(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="outside"), *changes("a", "2")])
    await lanes.run()
    assert await lanes.steps("a") == "2"


async def test_a_dead_letter_blocks_its_lane_and_a_replay_has_its_old_place(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1"), *changes("a", "2", how="die"), *changes("a", "3")])
    await lanes.run()
    await lanes.publish_all([*changes("a", "4"), *changes("b", "5")])
    await lanes.run()
    assert (await lanes.steps("a"), await lanes.steps("b")) == ("1", "5")
    letter = await lanes.letter()
    assert (letter["lane"], letter["blocks"]) == ("thing:a", True)
    await lanes.sql("UPDATE dead_letter SET payload = payload - 'how'")
    await resolve(lanes.connection, "replay", [letter["id"]], by="ada", why=None)
    assert await lanes.unparked() == ["2"]
    assert (await lanes.delivery("2"))["position"] == letter["position"]
    await lanes.run()
    assert await lanes.steps("a") == "1234"


async def test_a_correction_has_the_place_of_what_it_corrects(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="die"), *changes("a", "2")])
    await lanes.run()
    letter = await lanes.letter()
    await read_json(lanes.connection)
    payload = {"thing": "a", "note": "1", "how": ""}
    with pytest.raises(PublishError, match="thing says in which lane it stands"):
        await corrections.edit(lanes.connection, letter["id"], payload | {"thing": "b"}, by="ada", why=None)
    await corrections.edit(lanes.connection, letter["id"], payload, by="ada", why=None)
    assert await lanes.unparked() == ["1"]
    await lanes.run()
    assert await lanes.steps("a") == "12"


async def test_a_replay_may_die_again_at_the_same_place(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="die"), *changes("a", "2")])
    for _ in range(3):
        await lanes.run()
        letter = await lanes.letter()
        await resolve(lanes.connection, "replay", [letter["id"]], by="ada", why=None)
        assert await lanes.unparked() == ["1"]


async def test_a_discard_lets_the_next_one_go(lanes: Lanes) -> None:
    await lanes.publish_all([*changes("a", "1", how="die"), *changes("a", "23")])
    await lanes.run()
    assert await lanes.unparked() == []
    await resolve(lanes.connection, "discard", [(await lanes.letter())["id"]], by="ada", why=None)
    assert await lanes.unparked() == ["2"]
    await lanes.run()
    assert await lanes.steps("a") == "23"


async def test_a_lane_that_skips_goes_on_and_a_replay_goes_to_its_end(lanes: Lanes) -> None:
    await lanes.publish_all(Skipped(thing="a", note=note, how="die" * (note == "2")) for note in "123")
    await lanes.run()
    assert await lanes.steps("a") == "13"
    await lanes.publish_all(Skipped(thing="a", note=note) for note in "45")
    await lanes.sql("UPDATE dead_letter SET payload = payload - 'how'")
    await resolve(lanes.connection, "replay", [(await lanes.letter())["id"]], by="ada", why=None)
    assert await lanes.unparked() == ["4"]
    await lanes.run()
    assert await lanes.steps("a") == "13452"


async def test_many_lanes_are_replayed_and_discarded_at_once(lanes: Lanes) -> None:
    things = [f"t{number}" for number in range(40)]
    for thing in things:
        await lanes.publish_all([*changes(thing, "1", how="die"), *changes(thing, "2")])
    await lanes.run()
    ids = [row["id"] for row in await lanes.connection.fetch("SELECT id FROM dead_letter ORDER BY id")]
    await lanes.sql("UPDATE dead_letter SET payload = payload - 'how'")
    await resolve(lanes.connection, "replay", ids[:20], by="ada", why=None)
    await resolve(lanes.connection, "discard", ids[20:], by="ada", why=None)
    await lanes.run()
    assert [await lanes.steps(thing) for thing in things] == ["12"] * 20 + ["2"] * 20


@pytest.mark.parametrize("statement", [_DONE, "DELETE FROM outbox_message"])
async def test_what_is_taken_out_of_a_lane_holds_nobody_up(lanes: Lanes, statement: str) -> None:
    """A cancellation, or an expiry: of the first one the next comes due; of one that waits nothing changes."""
    await lanes.publish_all(changes("a", "1234"))
    await lanes.sql(f"{statement} WHERE payload ->> 'note' IN ('2', '4')")
    assert await lanes.unparked() == ["1"]
    await lanes.publish_all(changes("a", "5"))
    assert await lanes.unparked() == ["1"]
    await lanes.sql(f"{statement} WHERE payload ->> 'note' = '1'")
    assert await lanes.unparked() == ["3"]
    await lanes.run()
    assert await lanes.steps("a") == "35"
    await lanes.publish_all(changes("a", "6"))
    assert await lanes.unparked() == ["6"]


async def test_the_last_one_that_waits_is_taken_out_and_the_lane_is_not_free(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "12"))
    await lanes.sql(f"{_DONE} WHERE payload ->> 'note' = '2'")
    await lanes.publish_all(changes("a", "3"))
    assert await lanes.unparked() == ["1"]


async def test_a_completion_waits_for_a_cancellation_and_passes_over_what_is_gone(
    lanes: Lanes, connect: Connect
) -> None:
    await lanes.publish_all(changes("a", "123"))
    other = await connect()
    async with other.transaction():
        await other.execute(f"{_DONE} WHERE payload ->> 'note' = '2'")
        run = asyncio.create_task(lanes.runner.deliver((await lanes.delivery("1"))["id"]))
        await until(lambda: blocked(lanes))
    await run
    assert await lanes.unparked() == ["3"]


async def test_cancelled_in_the_transaction_that_published_it(lanes: Lanes) -> None:
    async with transaction(lanes.sessions) as session:
        publish(session, Changed(thing="a", note="1"))
        publish(session, Changed(thing="a", note="2"))
        await session.flush()
        await session.execute(text(f"{_DONE} WHERE payload ->> 'note' = '1'"))
    assert await lanes.unparked() == ["2"]


async def test_a_lost_worker_leaves_its_delivery_at_the_head(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "12"))
    first = (await lanes.delivery("1"))["id"]
    await lanes.set(first, state="running", attempts=1, claim_token=uuid4())
    await lanes.publish_all(changes("a", "3"))
    assert await lanes.unparked() == ["1"]
    await lanes.expire(first)
    await lanes.runner.deliver(first)
    await lanes.run()
    assert await lanes.steps("a") == "123"


async def test_a_worker_of_an_older_version_moves_the_lane_on(lanes: Lanes) -> None:
    """Its statements know of no lanes."""
    await lanes.publish_all(changes("a", "12"))
    await lanes.sql(f"{_DONE} WHERE payload ->> 'note' = '1'")
    assert await lanes.unparked() == ["2"]


async def test_an_unknown_consumer_holds_up_its_lane_and_then_blocks_it(lanes: Lanes, settings: Settings) -> None:
    await lanes.publish_all(changes("a", "12"))
    first = (await lanes.delivery("1"))["id"]
    await lanes.set(first, consumer="lanes.gone")
    await lanes.run(1)
    assert await lanes.unparked() == ["1"]
    long_ago = "jsonb_set(errors, '{0,at}', to_jsonb(clock_timestamp() - interval '2 days'))"
    await lanes.sql(f"UPDATE outbox_message SET errors = {long_ago}, due_at = clock_timestamp() WHERE id = $1", first)
    assert settings.outbox.unknown_consumer_after < 172_800
    await lanes.run()
    assert await lanes.unparked() == []
    assert (await lanes.letter())["blocks"]


async def test_a_lane_is_free_again_after_the_purge(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "1"))
    await lanes.run()
    await purge_step_by_step(lanes.connection, -timedelta(hours=2))
    assert await lanes.connection.fetchval("SELECT count(*) FROM outbox_message") == 0
    await lanes.publish_all(changes("a", "2"))
    assert await lanes.unparked() == ["2"]


async def test_erasing_leaves_no_key_and_lets_the_lane_go_on(lanes: Lanes) -> None:
    """The key may name a person."""
    await lanes.publish_all([*changes("ada", "1"), *changes("ada", "2", how="die")])
    await lanes.run()
    await read_json(lanes.connection)
    await erase(lanes.connection, ["ada"], by="bob", why="asked")
    for table in ("outbox_message", "dead_letter"):
        assert await lanes.connection.fetchval(f"SELECT count(*) FROM {table} WHERE {table}::text LIKE '%ada%'") == 0
    await lanes.publish_all(changes("ada", "3"))
    assert await lanes.unparked() == ["3"]


@pytest.mark.slow
async def test_publishers_and_consumers_across_lanes_do_not_deadlock(lanes: Lanes, connect: Connect) -> None:
    connection = await connect()

    async def publisher(number: int) -> None:
        for turn in range(15):
            async with transaction(lanes.sessions) as session:
                for thing in ("ping", "pong", "peng")[:: 1 if (number + turn) % 2 else -1]:
                    publish(session, Pinged(thing=thing, note="x", left=2))
                    await session.flush()

    async def worker(done: asyncio.Event) -> None:
        due = "SELECT id FROM outbox_message WHERE state = 'pending' AND due_at <= now()"
        while not done.is_set() or await lanes.unparked():
            for row in await connection.fetch(due):
                await lanes.runner.deliver(row["id"])

    done = asyncio.Event()
    work = asyncio.create_task(worker(done))
    await asyncio.gather(*(publisher(number) for number in range(4)))
    done.set()
    await work
    assert await lanes.connection.fetchval("SELECT count(*) FROM step") == 4 * 15 * 3 * 3
    assert await lanes.connection.fetchval("SELECT sum(jsonb_array_length(errors)) FROM outbox_message") == 0
    failed = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    assert await lanes.connection.fetchval(failed) == 0


@pytest.mark.slow
async def test_a_large_transaction_takes_no_lock_for_each_key(lanes: Lanes) -> None:
    """The server's table of locks has room for some thousands."""
    async with transaction(lanes.sessions) as session:
        for number in range(8_000):
            publish(session, Changed(thing=f"t{number % 4_000}", note=str(number)))
    assert len(await lanes.unparked()) == 4_000


async def test_above_read_committed_it_is_refused(lanes: Lanes, settings: Settings) -> None:
    """A statement there sees its lane as it was before the lock was taken."""
    engine = create_engine(settings.database, application_name="tests").execution_options(
        isolation_level="REPEATABLE READ"
    )
    with pytest.raises(DBAPIError, match="READ COMMITTED, not REPEATABLE READ"):
        async with transaction(session_factory(engine)) as session:
            publish(session, Changed(thing="a", note="1"))
    await engine.dispose()
    await lanes.publish_all(changes("a", "2"))
    assert await lanes.unparked() == ["2"]


async def test_a_delay_is_refused(lanes: Lanes) -> None:
    async with lanes.sessions() as session:
        with pytest.raises(PublishError, match="all behind it would wait"):
            publish(session, Changed(thing="a", note="1"), delay=timedelta(seconds=1))


@pytest.mark.parametrize("thing", ["", "x" * 256])
async def test_a_key_that_could_name_no_lane_is_refused(lanes: Lanes, thing: str) -> None:
    async with transaction(lanes.sessions) as session:
        with pytest.raises(PublishError, match="must be a scalar of 1 to 255 characters"):
            await accept(session, "partner-1", Changed(thing=thing, note="1"))
    assert await lanes.connection.fetchval("SELECT count(*) FROM accepted_event") == 0


async def test_the_test_kit_runs_a_lane_in_order(lanes: Lanes, settings: Settings, engine: AsyncEngine) -> None:
    await lanes.publish_all([*changes("a", "12"), *changes("a", "3", how="fail once"), *changes("a", "4")])
    async with inline_worker(settings, engine) as worker:
        await worker.make_due()
        assert await lanes.unparked() == ["1"]
        assert await worker.deliver_all(may_fail=True) == ["lanes.change"] * 3
        await worker.make_due()
        assert await worker.deliver_all() == ["lanes.change"] * 2
    assert await lanes.steps("a") == "1234"


async def test_parked_deliveries_are_neither_due_nor_old(lanes: Lanes) -> None:
    await lanes.publish_all(changes("a", "123"))
    queue = (await count_queues(lanes.connection))["lanes"]
    assert (queue.open, queue.due) == (3, 1)
    await lanes.sql("UPDATE outbox_message SET due_at = clock_timestamp() + interval '1 hour' WHERE due_at < now()")
    assert (await count(lanes.connection)).oldest is None
