"""Stops and deploys under load, two releases at the same time, and queues with processes of their own."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import psutil
import pytest

from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, effects_once, is_state
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.server import Rabbitmq
    from tests.servers.processes import Processes, Started

pytestmark = pytest.mark.slow

_API = "tests.proof.ledger.release.app:create_app"
_WORKER = "tests.proof.ledger.release.app:setup_broker"
_LEDGER = "tests.proof.ledger.app:setup_broker"


async def test_a_rolling_restart_under_load_uses_up_no_attempts(ledger: Ledger, processes: Processes) -> None:
    await processes.relay()
    running = await processes.worker(_LEDGER)
    for number in range(60):
        await ledger.publish(domain.Happened(subject_id=uuid4(), how="slow" if number % 3 == 0 else ""))
    for _ in range(2):
        next_one = await processes.worker(_LEDGER)
        assert await running.stop() == 0
        running = next_one
    await until(lambda: all_completed(ledger))
    await effects_once(ledger)
    assert await attempts_at_most(ledger) == 1


async def test_a_second_signal_does_not_wait_for_what_runs(ledger: Ledger, processes: Processes) -> None:
    await processes.relay()
    worker = await processes.worker(_LEDGER, OUTBOX__SHUTDOWN_GRACE="60")
    (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang"))
    await until(lambda: is_state(ledger, message_id, "running"))
    worker.process.terminate()
    await until(lambda: worker.says("Stopping worker process"))
    worker.process.terminate()
    await until(lambda: worker.process.poll() is not None, timeout=40)


async def test_the_relay_process_stops_at_once_with_status_0(ledger: Ledger, processes: Processes) -> None:
    relay = await processes.relay()
    async with asyncio.timeout(25):
        assert await relay.stop() == 0


async def test_queues_have_worker_pools_of_their_own(
    ledger: Ledger, processes: Processes, settings: Settings, tmp_path: Path
) -> None:
    """A `def` consumer that needs the CPU, in a process of its own, keeps no other queue waiting."""
    _, _, cpu = await asyncio.gather(
        processes.relay(),
        processes.worker(_LEDGER, "-p", "1", "-t", "2", "-Q", "ledger"),
        processes.worker(_LEDGER, "-p", "1", "-t", "1", "-Q", "cpu"),
    )
    (heavy,) = await ledger.publish(domain.Crunched(subject_id=uuid4(), until=str(tmp_path / "enough")))
    (waiting,) = await ledger.publish(domain.Crunched(subject_id=uuid4(), until=str(tmp_path / "enough")))
    await until(lambda: is_state(ledger, heavy, "running"))
    before = cpu_seconds(cpu)
    await until(lambda: cpu_seconds(cpu) - before > settings.outbox.lease, timeout=60)
    light = [(await ledger.publish())[0] for _ in range(20)]
    await until(lambda: all_completed_of(ledger, "ledger"))
    assert [await ledger.state(each) for each in (heavy, waiting)] == ["running", "dispatched"]
    (tmp_path / "enough").touch()
    await until(lambda: all_completed(ledger))
    # Its lease was kept meanwhile, though its process calculated all the time.
    assert await attempts_at_most(ledger) == 1
    assert [(tmp_path / str(each)).exists() for each in (heavy, waiting)] == [True, True]
    assert [await ledger.effects(each) for each in light] == [1] * 20


async def test_in_a_pool_for_all_queues_they_wait_for_each_other(
    ledger: Ledger, processes: Processes, tmp_path: Path
) -> None:
    """As many `def` consumers as there are threads; which is what the pools of the test before are good for."""
    await asyncio.gather(processes.relay(), processes.worker(_LEDGER, "-p", "1", "-t", "1"))
    (heavy,) = await ledger.publish(domain.Crunched(subject_id=uuid4(), until=str(tmp_path / "enough")))
    await until(lambda: is_state(ledger, heavy, "running"))
    (light,) = await ledger.publish(domain.Jotted(subject_id=uuid4()))
    await until(lambda: handed_over_again(ledger, light))
    (tmp_path / "enough").touch()
    await until(lambda: all_completed(ledger))
    first, second = await ledger.row(heavy), await ledger.row(light)
    assert first is not None
    assert second is not None
    assert first["completed_at"] <= second["started_at"]


def cpu_seconds(worker: Started) -> float:
    """CPU time that a worker's processes have used."""
    processes = psutil.Process(worker.process.pid).children(recursive=True)
    return sum(each.cpu_times().user + each.cpu_times().system for each in processes)


async def all_completed_of(ledger: Ledger, queue: str) -> bool:
    """Whether a queue's rows are completed."""
    return not await ledger.connection.fetchval(
        "SELECT count(*) FROM outbox_message WHERE state <> 'completed' AND queue = $1", queue
    )


async def handed_over_again(ledger: Ledger, message_id: UUID) -> bool:
    """Whether nobody took it for so long that the relay tried again."""
    row = await ledger.row(message_id)
    return row is not None and row["state"] == "dispatched" and row["dispatches"] > 1


_NOW_AND_THEN = 5
"""How often each event is published, so that both workers get some of each."""


async def release_all(api: Started) -> None:
    """Let an API publish each event of its release several times."""
    async with httpx.AsyncClient(base_url=api.url) as client:
        for _ in range(_NOW_AND_THEN):
            (await client.post("/releases")).raise_for_status()


async def effects_by_each(ledger: Ledger) -> dict[tuple[str, str], int]:
    """How many messages have had an effect, by consumer and note."""
    found = await ledger.connection.fetch("SELECT consumer, note, message_id FROM effect")
    assert len({row["message_id"] for row in found}) == len(found)
    return Counter((row["consumer"], row["note"]) for row in found)


async def postponed(ledger: Ledger) -> dict[str, int]:
    """How many rows wait for another release, by consumer: seen by a worker, and no attempt used up."""
    found = await ledger.connection.fetch(
        """SELECT consumer, count(*) FROM outbox_message
           WHERE state <> 'completed' AND errors::text LIKE '%UnknownConsumer%' AND attempts = 0 GROUP BY consumer"""
    )
    return {row["consumer"]: row["count"] for row in found}


async def attempts_at_most(ledger: Ledger) -> int:
    """The attempts of the row that has most of them."""
    return int(await ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message"))


async def test_newer_workers_beside_an_older_api(ledger: Ledger, processes: Processes) -> None:
    await processes.relay()
    worker = await processes.worker(_WORKER, RELEASE="newer")
    api = await processes.api(_API, RELEASE="older")
    await release_all(api)
    expected = {
        ("release.read_grown", "newer: 7"): _NOW_AND_THEN,
        ("release.read_raised", "newer: 2000 g"): _NOW_AND_THEN,
        ("release.before", "newer"): _NOW_AND_THEN,
        ("release.stays", "newer"): _NOW_AND_THEN,
    }

    async def all_but_the_removed_one() -> bool:
        return await effects_by_each(ledger) == expected and await postponed(ledger) == {"release.goes": _NOW_AND_THEN}

    await until(all_but_the_removed_one)
    await processes.worker(_WORKER, RELEASE="older")
    assert await worker.stop() == 0
    await until(lambda: all_completed(ledger))
    assert await effects_by_each(ledger) == expected | {("release.goes", "older"): _NOW_AND_THEN}
    assert await attempts_at_most(ledger) == 1


async def test_what_a_removed_consumer_left_behind_is_dead_in_the_end(ledger: Ledger, processes: Processes) -> None:
    await processes.relay()
    await processes.worker(_WORKER, RELEASE="newer", OUTBOX__UNKNOWN_CONSUMER_AFTER="1")
    await release_all(await processes.api(_API, RELEASE="older"))
    await until(lambda: all_completed(ledger))
    letters = await ledger.connection.fetch("SELECT consumer, reason, attempts FROM dead_letter")
    assert {tuple(row) for row in letters} == {("release.goes", "no consumer named release.goes is deployed", 0)}
    assert len(letters) == _NOW_AND_THEN


async def unknown_rows_wait_for_a_worker_that_knows_them(ledger: Ledger, processes: Processes) -> None:
    await processes.relay()
    older = await processes.worker(_WORKER, RELEASE="older")
    api = await processes.api(_API, RELEASE="newer")
    await release_all(api)
    only_newer = dict.fromkeys(("release.read_raised", "release.after", "release.comes"), _NOW_AND_THEN)

    async def what_an_older_one_can() -> bool:
        return await postponed(ledger) == only_newer and await effects_by_each(ledger) == {
            ("release.read_grown", "older"): _NOW_AND_THEN,
            ("release.stays", "older"): _NOW_AND_THEN,
        }

    await until(what_an_older_one_can)
    await processes.worker(_WORKER, RELEASE="newer")
    await release_all(api)
    assert await older.stop() == 0
    await until(lambda: all_completed(ledger), timeout=60)
    found = await effects_by_each(ledger)
    assert sum(found.values()) == 10 * _NOW_AND_THEN
    assert found["release.read_raised", "newer: 2000 g"] == 2 * _NOW_AND_THEN
    assert found["release.after", "newer"] == 2 * _NOW_AND_THEN
    assert found["release.comes", "newer"] == 2 * _NOW_AND_THEN
    assert found["release.read_grown", "older"] + found["release.read_grown", "newer: 9"] == 2 * _NOW_AND_THEN
    assert await attempts_at_most(ledger) == 1


async def test_an_unknown_consumers_row_is_kept_for_a_worker_that_knows_it(
    ledger: Ledger, processes: Processes
) -> None:
    await unknown_rows_wait_for_a_worker_that_knows_them(ledger, processes)


async def test_an_unknown_consumers_row_is_kept_on_rabbitmq_too(
    ledger: Ledger, processes: Processes, environment: dict[str, str], rabbitmq: Rabbitmq
) -> None:
    environment["BROKER__URL"] = rabbitmq.url
    await unknown_rows_wait_for_a_worker_that_knows_them(ledger, processes)
