"""One schedule, one open tick: what becomes of it when it runs, and when somebody changes something meanwhile."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from service.database.sessions import transaction
from service.errors import PublishError, ScheduleError
from service.ledger import replaying, scheduling
from service.ledger.ids import event_of
from service.ledger.purging import purge_step_by_step
from service.outbox import schedule, scheduled, unschedule
from service.outbox.schedules.definitions import declared
from service.outbox.schedules.starting import put_in_force
from tests.proof.schedules.domain import Beat, Unheard

if TYPE_CHECKING:
    import asyncpg

    from service.database.driver import Connection
    from service.outbox.running.runner import Runner
    from tests.proof.schedules.conftest import Schedules

HOUR = timedelta(hours=1)


async def due_now(ledger: Schedules, name: str, late: timedelta = timedelta(0)) -> datetime:
    """Let the schedule's next tick be due by so much, to the second."""
    at = (await ledger.now() - late).replace(microsecond=0)
    await ledger.rewind(name, at)
    return at


async def test_a_tick_publishes_and_writes_its_successor(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    at = await due_now(ledger, "hourly")
    tick_id = await ledger.tick_of("hourly")
    await runner.deliver(tick_id)
    assert await ledger.state(tick_id) == "completed"
    assert await ledger.published(tick_id) == [at]
    (following,) = await ledger.ticks("hourly")
    row = await ledger.row_of("hourly")
    assert row is not None
    assert following["due_at"] == row["next_at"] == at + HOUR
    assert (following["id"], row["last_at"]) == (row["tick_id"], at)
    # All that it causes has its correlation id.
    assert (await ledger.connection.fetchval("SELECT headers ->> 'correlation_id' FROM outbox_message WHERE "
            "event_type = 'schedules.beat'")) == str(event_of(tick_id))  # fmt: skip


@pytest.mark.parametrize(
    ("catch_up", "fired"), [("latest", [0]), ("all", [3, 2, 1, 0]), ("none", [])], ids=["latest", "all", "none"]
)
async def test_what_an_outage_has_missed(ledger: Schedules, runner: Runner, catch_up: str, fired: list[int]) -> None:
    await ledger.put("hourly", every=HOUR, catch_up=catch_up)
    first = await due_now(ledger, "hourly", 3 * HOUR + HOUR / 2)
    tick_id = await ledger.tick_of("hourly")
    await runner.deliver(tick_id)
    assert await ledger.published(tick_id) == [first + (3 - each) * HOUR for each in fired]
    (following,) = await ledger.ticks("hourly")
    assert following["due_at"] == first + 4 * HOUR


async def test_two_workers_with_the_same_tick_publish_once(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    await due_now(ledger, "hourly")
    tick_id = await ledger.tick_of("hourly")
    await asyncio.gather(*(runner.deliver(tick_id) for _ in range(5)))
    assert len(await ledger.published(tick_id)) == 1
    assert len(await ledger.ticks("hourly")) == 1


async def test_many_that_make_the_same_schedule_make_one(ledger: Schedules) -> None:
    moments = await asyncio.gather(*(ledger.put("daily", cron="0 9 * * *", tz="Asia/Tokyo") for _ in range(5)))
    assert len(set(moments)) == 1
    assert moments[0].astimezone(UTC).hour == 0
    assert len(await ledger.ticks("daily")) == 1


async def test_the_same_again_changes_nothing(ledger: Schedules) -> None:
    at = await ledger.put("hourly", every=HOUR)
    tick_id = await ledger.tick_of("hourly")
    assert await ledger.put("hourly", every=HOUR) == at
    assert await ledger.tick_of("hourly") == tick_id


async def test_what_is_changed_but_when_goes_on_where_it_was(ledger: Schedules) -> None:
    at = await ledger.put("hourly", every=HOUR)
    assert await ledger.put("hourly", every=HOUR, catch_up="all") == at
    assert await ledger.put("hourly", every=2 * HOUR, catch_up="all") > at
    assert len(await ledger.ticks("hourly")) == 1


async def test_a_tick_of_before_a_change_does_nothing(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    await due_now(ledger, "hourly")
    former = await ledger.tick_of("hourly")
    await ledger.set(former, state="dispatched")  # it is in the broker, so the change cannot take it back
    await ledger.put("hourly", every=2 * HOUR)
    await runner.deliver(former)
    assert await ledger.state(former) == "completed"
    assert await ledger.published(former) == []
    assert [each["id"] for each in await ledger.ticks("hourly")] == [await ledger.tick_of("hourly")]


async def test_a_schedule_that_is_removed_leaves_nothing(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    async with transaction(ledger.sessions) as session:
        assert await unschedule(session, "hourly")
        assert not await unschedule(session, "hourly")
    assert await ledger.row_of("hourly") is None
    assert await ledger.ticks("hourly") == []


async def test_a_tick_of_a_schedule_that_is_gone_does_nothing(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    await due_now(ledger, "hourly")
    tick_id = await ledger.tick_of("hourly")
    await ledger.set(tick_id, state="dispatched")
    async with transaction(ledger.sessions) as session:
        await unschedule(session, "hourly")
    await runner.deliver(tick_id)
    assert await ledger.state(tick_id) == "completed"
    assert await ledger.published(tick_id) == []


async def test_a_transaction_that_is_rolled_back_schedules_nothing(ledger: Schedules) -> None:
    async with ledger.sessions() as session:
        await schedule(session, "hourly", Beat(who="hourly"), every=HOUR)
        await session.rollback()
    assert await ledger.row_of("hourly") is None
    assert await ledger.ticks("hourly") == []


async def test_while_it_is_paused_nothing_happens_and_then_it_catches_up(
    ledger: Schedules, connection: Connection, runner: Runner
) -> None:
    await ledger.put("hourly", every=HOUR, catch_up="all")
    first = await due_now(ledger, "hourly", HOUR + HOUR / 2)
    under_way = await ledger.tick_of("hourly")
    await ledger.set(under_way, state="dispatched")
    assert await scheduling.pause(connection, "hourly", by="ann", why="the printer is away")
    assert not await scheduling.pause(connection, "hourly", by="bob", why=None)
    await runner.deliver(under_way)
    assert await ledger.published(under_way) == []
    assert await ledger.ticks("hourly") == []
    # Changed meanwhile, it stays paused.
    await ledger.put("hourly", every=HOUR, catch_up="latest")
    assert await ledger.ticks("hourly") == []
    assert await scheduling.resume(connection, "hourly", by="ann", why=None)
    assert not await scheduling.resume(connection, "hourly", by="ann", why=None)
    (tick,) = await ledger.ticks("hourly")
    await runner.deliver(tick["id"])
    assert await ledger.published(tick["id"]) == [first + HOUR]


async def test_a_run_by_hand_moves_nothing(ledger: Schedules, connection: Connection, runner: Runner) -> None:
    at = await ledger.put("hourly", every=HOUR)
    await scheduling.pause(connection, "hourly", by="ann", why=None)
    event_id = await scheduling.run(connection, "hourly", by="ann", why="to see it")
    (extra,) = await ledger.ticks("hourly")
    assert extra["event_id"] == event_id
    await runner.deliver(extra["id"])
    assert len(await ledger.published(extra["id"])) == 1
    row = await ledger.row_of("hourly")
    assert row is not None
    assert (row["next_at"], row["last_at"]) == (at, None)
    assert await scheduling.run(connection, "nightly", by="ann", why=None) is None


async def test_a_tick_that_no_code_here_knows_waits_for_other_code(ledger: Schedules, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    await ledger.connection.execute("UPDATE outbox_schedule SET event_type = 'schedules.gone'")
    await due_now(ledger, "hourly")
    tick_id = await ledger.tick_of("hourly")
    await runner.deliver(tick_id)
    row = await ledger.row(tick_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert "no consumer of schedules.gone" in row["errors"]


async def dead_tick(
    ledger: Schedules, runner: Runner, late: timedelta = timedelta(0)
) -> tuple[datetime, asyncpg.Record]:
    """A schedule's tick that died, after which its event is known again."""
    await ledger.put("hourly", every=HOUR)
    at = await due_now(ledger, "hourly", late)
    await ledger.connection.execute("UPDATE outbox_schedule SET event_type = 'schedules.gone'")
    tick_id = await ledger.tick_of("hourly")
    await runner.deliver(tick_id)
    yesterday = '[{"type": "Postpone", "attempt": 1, "at": "2020-01-01T00:00:00+00:00"}]'
    await ledger.set(tick_id, errors=yesterday, state="dispatched")
    await runner.deliver(tick_id)
    letter = await ledger.dead_letter(tick_id)
    assert letter is not None
    assert "no consumer of schedules.gone" in letter["reason"]
    await ledger.connection.execute("UPDATE outbox_schedule SET event_type = 'schedules.beat'")
    return at, letter


async def test_a_schedule_whose_tick_died_stops_until_a_replay(
    ledger: Schedules, connection: Connection, runner: Runner
) -> None:
    at, letter = await dead_tick(ledger, runner)
    (listed,) = await scheduling.list_all(connection)
    assert (listed.waits, listed.dead_letter) == (False, letter["id"])
    assert not await scheduling.resume(connection, "hourly", by="ann", why=None)  # it is not for that to decide
    async with transaction(ledger.sessions) as session:
        assert await scheduling.write_lost_ticks(session) == []
    await replaying.resolve(connection, "replay", [letter["id"]], by="ann", why=None)
    await runner.deliver(letter["message_id"])
    assert await ledger.published(letter["message_id"]) == [at]
    assert len(await ledger.ticks("hourly")) == 1


@pytest.mark.parametrize("late", [timedelta(0), 2 * HOUR], ids=["in time", "late"])
async def test_a_dead_tick_that_is_discarded_is_left_out_and_the_schedule_goes_on(
    ledger: Schedules, connection: Connection, runner: Runner, late: timedelta
) -> None:
    at, letter = await dead_tick(ledger, runner, late)
    await replaying.resolve(connection, "discard", [letter["id"]], by="ann", why=None)
    (tick,) = await ledger.ticks("hourly")
    assert tick["event_id"] == letter["event_id"]
    await runner.deliver(tick["id"])
    assert await ledger.published(tick["id"]) == ([at + 2 * HOUR] if late else [])
    (following,) = await ledger.ticks("hourly")
    assert following["due_at"] == at + late + HOUR


async def test_a_tick_that_was_lost_is_written_again(ledger: Schedules, connection: Connection, runner: Runner) -> None:
    at = await ledger.put("hourly", every=HOUR)
    await connection.execute("DELETE FROM outbox_message")
    async with transaction(ledger.sessions) as session:
        assert await scheduling.write_lost_ticks(session) == ["hourly"]
    (tick,) = await ledger.ticks("hourly")
    assert tick["due_at"] == at
    await connection.execute("DELETE FROM outbox_message")
    assert await scheduling.resume(connection, "hourly", by="ann", why=None)
    assert [each["due_at"] for each in await ledger.ticks("hourly")] == [at]


async def test_ticks_are_purged_like_every_delivery(ledger: Schedules, connection: Connection, runner: Runner) -> None:
    await ledger.put("hourly", every=HOUR)
    await due_now(ledger, "hourly")
    tick_id = await ledger.tick_of("hourly")
    await runner.deliver(tick_id)
    purged = await purge_step_by_step(connection, timedelta(0))
    assert purged is not None
    assert purged.deliveries == 1
    assert await ledger.row(tick_id) is None
    assert len(await ledger.ticks("hourly")) == 1


@pytest.mark.usefixtures("nothing_declared")
async def test_what_the_code_declares_replaces_what_it_declared(ledger: Schedules) -> None:
    scheduled("0 3 * * *", name="night")(Beat)
    scheduled("0 15 * * *", name="day")(Beat)
    await ledger.put("mine", every=HOUR)
    async with transaction(ledger.sessions) as session:
        await put_in_force(session, declared())
    night = await ledger.tick_of("night")
    async with transaction(ledger.sessions) as session:
        await put_in_force(session, [each for each in declared() if each.name == "night"])
    assert await ledger.tick_of("night") == night
    assert await ledger.row_of("day") is None
    assert await ledger.ticks("day") == []
    assert len(await ledger.ticks("mine")) == 1


async def test_ticks_follow_their_consumer_to_another_queue(ledger: Schedules) -> None:
    at = await ledger.put("hourly", every=HOUR)
    await ledger.connection.execute("UPDATE outbox_schedule SET queue = 'former'")
    await ledger.connection.execute("UPDATE outbox_message SET queue = 'former'")
    async with transaction(ledger.sessions) as session:
        await put_in_force(session, [])
    (tick,) = await ledger.ticks("hourly")
    assert (tick["queue"], tick["due_at"], tick["id"]) == ("beats", at, await ledger.tick_of("hourly"))


@pytest.mark.usefixtures("nothing_declared")
async def test_the_codes_schedules_are_the_codes(ledger: Schedules) -> None:
    scheduled("0 3 * * *", name="night")(Beat)
    async with transaction(ledger.sessions) as session:
        await put_in_force(session, declared())
        assert not await unschedule(session, "night")
    with pytest.raises(ScheduleError, match="the code declares a schedule named 'night'"):
        await ledger.put("night", every=HOUR)


async def test_an_event_that_nobody_consumes_is_not_scheduled(ledger: Schedules) -> None:
    async with transaction(ledger.sessions) as session:
        with pytest.raises(ScheduleError, match=r"nobody consumes 'schedules\.unheard'"):
            await schedule(session, "silence", Unheard(), every=HOUR)
        with pytest.raises(PublishError, match="takes an instance"):
            await schedule(session, "silence", Unheard, every=HOUR)  # type: ignore[arg-type]
        for name in ("", "x" * 201, "a\0b"):
            with pytest.raises(ScheduleError, match="1 to 200 characters"):
                await schedule(session, name, Beat(), every=HOUR)
        with pytest.raises(ScheduleError, match="catch_up is one of latest, all, none"):
            await schedule(session, "beat", Beat(), every=HOUR, catch_up="some")
