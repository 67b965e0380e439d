"""Schedules in real processes: killed, restarted, and of two versions side by side."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import pytest
import redis

from tests.waiting import until

if TYPE_CHECKING:
    from service.dev.valkey import Valkey
    from tests.proof.schedules.conftest import Schedules
    from tests.servers.processes import Processes, Started

pytestmark = pytest.mark.slow

_WORKER = "tests.proof.schedules.app:setup_broker"
_SECOND = timedelta(seconds=1)
_BEATS = 25

_END_SOME = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'outbox%' AND pid <> pg_backend_pid()
    ORDER BY random() LIMIT 2) AS chosen
"""
# Each time from the first one on, how often it was published: what is not 1 was missed or doubled.
_ODD = """
WITH beats AS (SELECT at, count(*) FROM beat WHERE who = $1 GROUP BY at),
     grid AS (SELECT generate_series(min(at), max(at), interval '1 second') AS at FROM beats)
SELECT at, coalesce(count, 0) FROM grid FULL JOIN beats USING (at) WHERE count IS DISTINCT FROM 1
"""


async def beats(ledger: Schedules, who: str) -> int:
    """How many there were."""
    return int(await ledger.connection.fetchval("SELECT count(*) FROM beat WHERE who = $1", who))


async def test_no_tick_is_missed_or_doubled_whoever_dies(
    ledger: Schedules, processes: Processes, own_broker: Valkey
) -> None:
    names = [f"every-second-{number}" for number in range(3)]
    await asyncio.gather(*(ledger.put(each, every=_SECOND, catch_up="all") for each in names))
    relays = [await processes.relay() for _ in range(2)]
    workers = [await processes.worker(_WORKER) for _ in range(2)]
    strikes = random.Random(20)
    for _ in range(6):
        reached = await beats(ledger, names[0]) + 2
        await until(partial(_reached, ledger, names[0], reached), timeout=120)
        match strikes.randrange(4):
            case 0:
                with redis.Redis.from_url(own_broker.url) as client:
                    client.flushall()
            case 1:
                await ledger.connection.fetchval(_END_SOME)
            case 2:
                await relays.pop(0).kill()
                relays.append(await processes.relay())
            case 3:
                await workers.pop(0).kill()
                workers.append(await processes.worker(_WORKER))
    for name in names:
        await until(partial(_reached, ledger, name, _BEATS), timeout=180)
        assert await ledger.connection.fetch(_ODD, name) == []
        assert len(await ledger.ticks(name)) <= 1


async def _reached(ledger: Schedules, who: str, count: int) -> bool:
    return await beats(ledger, who) >= count


async def in_force(ledger: Schedules, *expected: str) -> bool:
    """Whether the declared schedules are these, each with its tick."""
    rows = await ledger.connection.fetch("SELECT name || '=' || cron AS said, name FROM outbox_schedule ORDER BY name")
    return [row["said"] for row in rows] == sorted(expected) and all(
        [len(await ledger.ticks(row["name"])) == 1 for row in rows]
    )


async def test_old_code_changes_nothing_while_new_code_runs_and_may_come_back(
    ledger: Schedules, processes: Processes
) -> None:
    old, new = "day=0 15 * * *;night=0 3 * * *", "night=0 4 * * *"

    async def worker(declared: str) -> Started:
        return await processes.worker(_WORKER, DECLARED=declared)

    first = await worker(old)
    await until(lambda: in_force(ledger, *old.split(";")))
    newer = await worker(new)
    await until(lambda: newer.says("worker processes declare other schedules"))
    # A worker of the old code that is started during the deploy leaves it at that.
    again = await worker(old)
    await until(lambda: again.says("worker processes declare other schedules"))
    assert await in_force(ledger, *old.split(";"))
    await asyncio.gather(first.stop(), again.stop())
    await until(lambda: in_force(ledger, new))
    # One that is started late, by a node that came back, changes nothing either.
    stray = await worker(old)
    await until(lambda: stray.says("worker processes declare other schedules"))
    await stray.stop()
    assert await in_force(ledger, new)
    # Rolled back: the old code alone is left.
    back = await worker(old)
    await until(lambda: back.says("worker processes declare other schedules"))
    await newer.stop()
    await until(lambda: in_force(ledger, *old.split(";")))
