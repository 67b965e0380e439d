"""What workers have run, and which processes there are: in the ledger, without costing a delivery anything."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import psutil
import pytest
from sqlalchemy import text

import relay.process.purge
import relay.process.reporting
import service.outbox.running.recorder
from relay.process.purge import purge_regularly
from relay.process.tally import Tally
from service.database.engine import create_engine, pool_timeouts
from service.ledger import delivering, statistics
from service.ledger.presence import Presence
from service.ledger.statistics import BOUNDS, Key, ProcessIdentity, Runs, Vitals
from service.outbox.running.runner import Runner
from service.telemetry.loop_lag import LoopLag
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, dispatched
from tests.proof.ledger.working import start_worker, working
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.database.driver import Connection
    from service.dev.postgres import Postgres
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

COMPLETED = Key("stock", "orders.reserve_stock", "completed")
DAY = timedelta(days=1)


def counts(*durations: float) -> Runs:
    counted = Runs(len(durations))
    for seconds in durations:
        counted.run.add(seconds)
        counted.effect.add(seconds)
    return counted


def a_process(kind: str = "worker") -> ProcessIdentity:
    return ProcessIdentity(uuid4(), kind, "a-host", os.getpid(), ["email", "stock"], 8, "1f3a")


async def set_back(connection: Connection, by: timedelta) -> None:
    """Let all minutes, but not the totals, have been earlier."""
    await connection.execute("UPDATE outbox_minute SET minute = minute - $1::interval WHERE minute > '-infinity'", by)


async def test_what_is_added_stands_in_its_minute_and_in_the_totals(
    connection: Connection,
) -> None:
    failed = COMPLETED._replace(outcome="failed")
    await statistics.add(connection, {COMPLETED: counts(0.005, 0.2), failed: counts(4_000)})
    await set_back(connection, timedelta(minutes=5))
    await statistics.add(connection, {COMPLETED: counts(0.006)})
    totals = await statistics.totals(connection)
    assert totals == {COMPLETED: counts(0.005, 0.2, 0.006), failed: counts(4_000)}
    assert totals[COMPLETED].run.buckets[:6] == [1, 1, 0, 0, 0, 1]
    assert totals[failed].run.buckets == [0] * len(BOUNDS) + [1]
    minutes = await statistics.minutes(connection, DAY)
    assert [(key, counted) for _, key, counted in minutes] == [
        (COMPLETED, counts(0.005, 0.2)),
        (failed, counts(4_000)),
        (COMPLETED, counts(0.006)),
    ]
    now = await connection.fetchval("SELECT clock_timestamp()")
    assert now - minutes[-1][0] < timedelta(minutes=2)
    assert minutes[-1][0].second == 0
    assert len(await statistics.minutes(connection, timedelta(minutes=2))) == 1


async def test_many_who_add_at_the_same_time_never_deadlock_and_lose_nothing(
    connection: Connection, connect: Connect
) -> None:
    keys = [Key(f"queue-{number}", "consumer", "completed") for number in range(40)]

    async def add_often(in_order: list[Key]) -> None:
        own = await connect()
        for _ in range(25):
            await statistics.add(own, {key: counts(0.1) for key in in_order})

    await asyncio.gather(add_often(keys), add_often(keys[::-1]), add_often(keys[20:] + keys[:20]), add_often(keys))
    totals = await statistics.totals(connection)
    assert {counted.count for counted in totals.values()} == {100}
    assert totals.keys() == set(keys)


async def test_old_minutes_go_and_the_totals_stay(connection: Connection) -> None:
    for _ in range(3):
        await statistics.add(connection, {COMPLETED: counts(1)})
        await set_back(connection, DAY)
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=1) == 1
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=100) == 1
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=100) == 0
    assert len(await statistics.minutes(connection, 10 * DAY)) == 1
    assert await statistics.totals(connection) == {COMPLETED: counts(1, 1, 1)}


async def test_a_process_is_there_until_it_leaves_or_is_not_seen(
    connection: Connection,
) -> None:
    worker, relay = a_process(), a_process("relay")
    await statistics.report(connection, worker, timedelta(minutes=3))
    await statistics.report(connection, relay, timedelta())
    await statistics.report(connection, worker, timedelta(minutes=3), Vitals(2, 0.25, 1))
    seen = await statistics.processes(connection)
    assert [(each.id, each.kind, each.running, each.loop_lag, each.pool_timeouts) for each in seen] == [
        (relay.id, "relay", 0, 0.0, 0),
        (worker.id, "worker", 2, 0.25, 1),
    ]
    assert (seen[1].queues, seen[1].threads, seen[1].version) == (["email", "stock"], 8, "1f3a")
    assert timedelta(minutes=3) <= seen[1].seen_at - seen[1].started_at < timedelta(minutes=4)
    await statistics.leave(connection, relay)
    await connection.execute("UPDATE outbox_process SET seen_at = seen_at - interval '1 minute'")
    assert await statistics.processes(connection) == []
    assert await statistics.forget_processes(connection) == 0
    await connection.execute("UPDATE outbox_process SET seen_at = seen_at - interval '1 hour'")
    assert await statistics.forget_processes(connection) == 1


async def test_nobody_who_adds_or_reports_waits_for_a_standby(own_postgres: Postgres) -> None:
    own = await asyncpg.connect(own_postgres.url("service"))
    await own.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    await own.execute("SELECT pg_reload_conf()")
    await until(lambda: own.fetchval("SELECT current_setting('synchronous_standby_names') = 'nobody'"))
    worker = a_process()
    async with asyncio.timeout(60):
        await statistics.report(own, worker, timedelta())
        await statistics.add(own, {COMPLETED: counts(1)})
        await statistics.leave(own, worker)
    await own.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reported every 10 s is reported all the time."""
    for module in (service.outbox.running.recorder, relay.process.reporting):
        monkeypatch.setattr(module, "REPORT_EVERY", 0.02)


@asynccontextmanager
async def reporting(settings: Settings) -> AsyncIterator[Runner]:
    """A worker's runner that reports, on the test's loop."""
    engine = create_engine(settings.database, application_name="outbox-worker")
    runner, lag = Runner(settings, engine), LoopLag(1)
    await runner.open()
    lag.start()
    runner.report(Presence("worker", "1f3a", lag, partial(pool_timeouts, engine), queues={"ledger"}, threads=4))
    try:
        yield runner
    finally:
        await runner.close()
        lag.stop()
        await engine.dispose()


async def outcomes(connection: Connection) -> dict[str, int]:
    """How many runs of `ledger.react` came to what, in all."""
    totals = await statistics.totals(connection)
    return {key.outcome: counted.count for key, counted in totals.items() if key.consumer == "ledger.react"}


async def test_every_outcome_is_counted_for_what_it_was(ledger: Ledger, settings: Settings) -> None:
    async with reporting(settings) as runner:
        for how in ("", "outside", "outside", "fail", "die", "kill_backend"):
            await runner.deliver(await ledger.happen(how))
        unknown, stolen = await ledger.happen(), await ledger.happen("slow")
        await ledger.set(unknown, version=9)
        await runner.deliver(unknown)
        run = asyncio.create_task(runner.deliver(stolen))
        await until(lambda: runs(ledger))
        await ledger.set(stolen, claim_token=uuid4())
        await run
    assert await outcomes(ledger.connection) == {
        "completed": 3,
        "failed": 1,
        "dead": 1,
        "released": 1,
        "unknown": 1,
        "lost": 1,
    }
    assert await statistics.processes(ledger.connection) == []


async def runs(ledger: Ledger) -> bool:
    return bool(await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'running'"))


async def test_durations_are_those_of_postgresqls_clock_from_when_it_was_due_first(
    ledger: Ledger, settings: Settings
) -> None:
    hour = timedelta(hours=1)
    plain, late = await ledger.happen("slow"), await ledger.happen()
    (delayed,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="retry"), delay=hour)
    now = await ledger.connection.fetchval("SELECT clock_timestamp()")
    await ledger.set(late, created_at=now - 2 * hour)
    await ledger.set(delayed, created_at=now - hour)
    await ledger.expire(delayed)
    async with reporting(settings) as runner:
        for each in (plain, late, delayed):
            await runner.deliver(each)
        await ledger.expire(delayed)
        await runner.deliver(delayed)
    totals = await statistics.totals(ledger.connection)
    completed, failed = (totals[Key("ledger", "ledger.react", outcome)] for outcome in ("completed", "failed"))
    assert 1 <= completed.run.seconds < 60
    assert completed.start.buckets[-1] == completed.effect.buckets[-1] == 1
    assert 7_200 < completed.start.seconds < completed.effect.seconds - 1 < 7_260
    assert (failed.count, sum(failed.run.buckets)) == (2, 2)
    assert sum(failed.start.buckets) == 1, "of the first attempt"
    assert failed.start.seconds < 60
    assert sum(failed.effect.buckets) == 0


async def test_what_a_delayed_delivery_publishes_is_not_taken_for_delayed(ledger: Ledger) -> None:
    (delayed,) = await ledger.publish(delay=timedelta(hours=1))
    await ledger.expire(delayed)
    claim = await delivering.claim(ledger.connection, delayed, uuid4(), timedelta(seconds=30))
    assert claim is not None
    assert claim.headers.keys() == {"correlation_id"}  # events published in the run inherit them


@pytest.mark.usefixtures("hasty")
async def test_deliveries_go_on_while_the_ledger_takes_no_counts(
    ledger: Ledger, settings: Settings, connect: Connect
) -> None:
    blocker = await connect()
    async with reporting(settings) as runner:
        await until(lambda: statistics.processes(ledger.connection))
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE outbox_minute")
            for _ in range(20):
                message_id = await ledger.happen()
                async with asyncio.timeout(10):
                    await runner.deliver(message_id)
                assert await ledger.state(message_id) == "completed"
        await blocker.execute("ALTER TABLE outbox_minute RENAME TO gone")
        await runner.deliver(await ledger.happen())
        await until(lambda: failing(runner))
        await blocker.execute("ALTER TABLE gone RENAME TO outbox_minute")
        await until(lambda: counted(ledger, 21))


def failing(runner: Runner) -> bool:
    return runner._recorder._failing


async def counted(ledger: Ledger, completed: int) -> bool:
    return await outcomes(ledger.connection) == {"completed": completed}


@pytest.mark.usefixtures("hasty")
async def test_an_idle_worker_writes_nothing_but_that_it_is_there(ledger: Ledger, settings: Settings) -> None:
    async with reporting(settings) as runner:
        await until(lambda: statistics.processes(ledger.connection))
        [before] = await statistics.processes(ledger.connection)
        for _ in range(3):
            [now] = await statistics.processes(ledger.connection)
            await until(partial(seen_after, ledger, now.seen_at))
        run = asyncio.create_task(runner.deliver(await ledger.happen("slow")))
        await until(lambda: runs_now(ledger, 1))
        time.sleep(1.5)  # noqa: ASYNC251  holds up the loop
        await run
        await until(lambda: runs_now(ledger, 0))
        [after] = await statistics.processes(ledger.connection)
    assert (after.id, after.started_at, after.queues, after.threads) == (before.id, before.started_at, ["ledger"], 4)
    assert before.loop_lag < 0.8 < after.loop_lag
    assert len(await statistics.minutes(ledger.connection, DAY)) == 1


async def seen_after(ledger: Ledger, moment: object) -> bool:
    [process] = await statistics.processes(ledger.connection)
    assert await statistics.totals(ledger.connection) == {}
    return process.seen_at != moment


async def runs_now(ledger: Ledger, number: int) -> bool:
    [process] = await statistics.processes(ledger.connection)
    return process.running == number


@pytest.mark.parametrize("by", ["a lock", "an error"])
async def test_a_worker_that_cannot_report_its_last_runs_says_so(
    ledger: Ledger, settings: Settings, connect: Connect, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    blocker = await connect()
    async with blocker.transaction(), reporting(settings) as runner:
        await until(lambda: statistics.processes(ledger.connection))
        await runner.deliver(await ledger.happen())
        await blocker.execute("LOCK TABLE outbox_minute" if by == "a lock" else "SELECT 1")
        if by == "an error":
            await ledger.connection.execute("DROP TABLE outbox_minute")
    assert capsys.readouterr().out.count("outbox.statistics_lost") == 1


@pytest.mark.usefixtures("hasty")
async def test_a_delivery_that_waits_in_vain_for_a_connection_is_counted(ledger: Ledger, settings: Settings) -> None:
    settings.database.pool_size, settings.database.pool_timeout = 1, 0.1
    async with reporting(settings) as runner:
        async with runner.connections.sessions() as session:
            await session.execute(text("SELECT 1"))
            await runner.deliver(message_id := await ledger.happen())
        await until(lambda: pool_timeouts_told(ledger))
        row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)


async def pool_timeouts_told(ledger: Ledger) -> bool:
    return [each.pool_timeouts for each in await statistics.processes(ledger.connection)] == [1]


@pytest.mark.slow
async def test_a_killed_worker_loses_no_more_than_was_not_reported_yet(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path) as worker:
        for _ in range(10):
            await ledger.publish()
        await until(lambda: counted(ledger, 10))
        [process] = [each for each in await statistics.processes(ledger.connection) if each.kind == "worker"]
        assert process.pid in [each.pid for each in worker.children()]
        assert set(process.queues) >= {"ledger", "other", "cpu"}
        psutil.Process(process.pid).kill()
    assert [each.id for each in await statistics.processes(ledger.connection)] == [process.id]


@pytest.mark.slow
async def test_counters_go_on_after_a_restart_and_an_end_in_good_order_loses_nothing(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment["VERSION"] = "1f3a"
    async with relaying(settings):
        for number in (1, 2):
            for _ in range(25):
                await ledger.publish()
            worker = start_worker(environment, tmp_path / "worker.log", "-p", "2", "-t", "2", "-Q", "ledger")
            try:
                await until(lambda: all_completed(ledger))
                workers = [each for each in await statistics.processes(ledger.connection) if each.kind == "worker"]
                assert {(each.version, tuple(each.queues), each.threads) for each in workers} == {
                    ("1f3a", ("ledger",), 2)
                }
            finally:
                assert await worker.stop() == 0
            assert await outcomes(ledger.connection) == {"completed": number * 25}
            assert [each.kind for each in await statistics.processes(ledger.connection)] == ["relay"]


@pytest.mark.usefixtures("hasty")
async def test_a_relay_is_there_while_it_runs(ledger: Ledger, settings: Settings) -> None:
    async with relaying(settings):
        [seen] = await until(lambda: statistics.processes(ledger.connection))
        assert (seen.kind, seen.pid, seen.queues) == ("relay", os.getpid(), [])
        await ledger.publish()  # wakes it up
        await until(lambda: seen_after(ledger, seen.seen_at))
    assert await statistics.processes(ledger.connection) == []


@pytest.mark.usefixtures("hasty")
async def test_a_relay_hands_over_also_where_it_cannot_report(ledger: Ledger, settings: Settings) -> None:
    await ledger.connection.execute("DROP TABLE outbox_process")
    async with relaying(settings):
        (message_id,) = await ledger.publish()
        await until(lambda: dispatched(ledger, message_id))


async def test_the_regular_purge_takes_old_minutes_and_lost_processes(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.process.purge, "EVERY", 0.01)
    monkeypatch.setattr(relay.process.purge, "PAGE", 1)
    settings.outbox.keep_statistics = 2 * 86_400
    for _ in range(4):
        await set_back(ledger.connection, DAY)
        await statistics.add(ledger.connection, {COMPLETED: counts(1)})
    lost, there = a_process(), a_process()
    await statistics.report(ledger.connection, lost, timedelta())
    await ledger.connection.execute("UPDATE outbox_process SET seen_at = seen_at - interval '61 minutes'")
    await statistics.report(ledger.connection, there, timedelta())
    purging = asyncio.create_task(purge_regularly(settings, tally := Tally()))
    await until(lambda: purged(ledger, there))
    purging.cancel()
    with suppress(asyncio.CancelledError):
        await purging
    assert len(await statistics.minutes(ledger.connection, 9 * DAY)) == 2
    assert tally.purged["outbox_minute"] == 2
    assert await outcomes_of_all(ledger) == 4


async def test_a_purge_that_fails_is_counted_told_of_and_tried_again(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(relay.process.purge, "EVERY", 0.01)
    await ledger.connection.execute("ALTER TABLE outbox_minute RENAME TO gone")
    purging = asyncio.create_task(purge_regularly(settings, tally := Tally()))
    await until(lambda: tally.purge_failures > 1)
    monkeypatch.setattr(settings.database, "url", None)  # a bug, as good as any
    failures = tally.purge_failures
    await until(lambda: tally.purge_failures > failures + 1)
    monkeypatch.undo()
    purging.cancel()
    with suppress(asyncio.CancelledError):
        await purging
    said = capsys.readouterr().out
    assert said.count("relay.purge_failed") == tally.purge_failures
    assert "UndefinedTableError" in said
    assert "AttributeError" in said


async def purged(ledger: Ledger, there: ProcessIdentity) -> bool:
    return [each.id for each in await statistics.processes(ledger.connection, DAY)] == [there.id]


async def outcomes_of_all(ledger: Ledger) -> int:
    return (await statistics.totals(ledger.connection))[COMPLETED].count
