"""What workers have run, and which processes there are: in the ledger, without costing a delivery anything."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from service.ledger import statistics
from service.ledger.statistics import BOUNDS, Counts, Key, Process

if TYPE_CHECKING:
    import asyncpg

    from tests.proof.ledger.conftest import Connect

COMPLETED = Key("stock", "orders.reserve_stock", "completed")
DAY = timedelta(days=1)


def counts(*durations: float) -> Counts:
    counted = Counts(len(durations))
    for seconds in durations:
        counted.run.add(seconds)
        counted.effect.add(seconds)
    return counted


def a_process(kind: str = "worker") -> Process:
    return Process(uuid4(), kind, "a-host", os.getpid(), ["email", "stock"], 8, "1f3a")


async def set_back(connection: asyncpg.Connection[asyncpg.Record], by: timedelta) -> None:
    """Let all minutes, but not the totals, have been earlier."""
    await connection.execute("UPDATE outbox_minute SET minute = minute - $1::interval WHERE minute > '-infinity'", by)


async def test_what_is_added_stands_in_its_minute_and_in_the_totals(
    connection: asyncpg.Connection[asyncpg.Record],
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
    connection: asyncpg.Connection[asyncpg.Record], connect: Connect
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


async def test_old_minutes_go_and_the_totals_stay(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    for _ in range(3):
        await statistics.add(connection, {COMPLETED: counts(1)})
        await set_back(connection, DAY)
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=1) == 1
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=100) == 1
    assert await statistics.forget_minutes(connection, 1.5 * DAY, limit=100) == 0
    assert len(await statistics.minutes(connection, 10 * DAY)) == 1
    assert await statistics.totals(connection) == {COMPLETED: counts(1, 1, 1)}


async def test_a_process_is_there_until_it_leaves_or_is_not_seen(
    connection: asyncpg.Connection[asyncpg.Record],
) -> None:
    worker, relay = a_process(), a_process("relay")
    await statistics.report(connection, worker, timedelta(minutes=3), 0, 0.0)
    await statistics.report(connection, relay, timedelta(), 0, 0.0)
    await statistics.report(connection, worker, timedelta(minutes=3), 2, 0.25)
    seen = await statistics.processes(connection)
    assert [(each.id, each.kind, each.running, each.loop_lag) for each in seen] == [
        (relay.id, "relay", 0, 0.0),
        (worker.id, "worker", 2, 0.25),
    ]
    assert (seen[1].queues, seen[1].threads, seen[1].version) == (["email", "stock"], 8, "1f3a")
    assert timedelta(minutes=3) <= seen[1].seen_at - seen[1].started_at < timedelta(minutes=4)
    await statistics.leave(connection, relay)
    await connection.execute("UPDATE outbox_process SET seen_at = seen_at - interval '1 minute'")
    assert await statistics.processes(connection) == []
    assert await statistics.forget_processes(connection) == 0
    await connection.execute("UPDATE outbox_process SET seen_at = seen_at - interval '1 hour'")
    assert await statistics.forget_processes(connection) == 1
