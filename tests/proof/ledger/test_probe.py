"""The probe of relay and workers tells a process that hangs from one that idles, works or waits out an outage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.dev.places import ROOT
from tests.proof.ledger import domain
from tests.proof.ledger.looks import is_state
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    import psutil

    from service.dev.postgres import Postgres
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.servers.processes import Processes, Started

pytestmark = pytest.mark.slow

WORKER = "tests.proof.ledger.app:setup_broker"


class Probe:
    """The command, as a supervisor runs it."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        environment["PROBE_FOLDER"] = str(folder)
        self.folder = folder
        self._environment = environment
        self.said = ""

    def __call__(self, *arguments: str) -> int:
        command = [sys.executable, "-m", "service.telemetry.probe", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        self.said = done.stdout + done.stderr
        return done.returncode

    async def passes(self, *arguments: str) -> None:
        await until(lambda: self(*arguments) == 0, every=0.1, what="the probe to pass")

    async def fails(self, *arguments: str) -> None:
        await until(lambda: self(*arguments) == 1, every=0.1, what="the probe to fail")

    def touched(self) -> float:
        """When the only process last was."""
        [file] = self.folder.iterdir()
        return file.stat().st_mtime


@pytest.fixture
def probe(environment: dict[str, str], tmp_path: Path) -> Probe:
    return Probe(environment, tmp_path / "signs" / "of life")


def children_that_work(worker: Started, probe: Probe) -> list[psutil.Process]:
    """Those that show themselves, of a worker's."""
    pids = {int(each.name.rpartition("-")[2]) for each in probe.folder.iterdir()}
    return [each for each in worker.children() if each.pid in pids]


async def test_a_process_that_stands_still_fails_it_and_its_brothers_do_not_hide_that(
    processes: Processes, probe: Probe
) -> None:
    worker = await processes.worker(WORKER, "-p", "2", "-t", "1")
    await until(lambda: probe() == 0 and probe.said.count("is well") == 2, every=0.1)
    first, second = children_that_work(worker, probe)
    second.suspend()
    try:
        await probe.fails()
        assert f"worker-{second.pid} has not answered for" in probe.said
        assert f"worker-{first.pid} is well" in probe.said
    finally:
        second.resume()
    await probe.passes()
    assert await worker.stop() == 0
    assert list(probe.folder.iterdir()) == []


async def test_a_relay_that_stands_still_fails_it(processes: Processes, probe: Probe) -> None:
    relay = await processes.relay()
    await probe.passes("ready")
    relay.process.send_signal(signal.SIGSTOP)
    try:
        await probe.fails()
    finally:
        relay.process.send_signal(signal.SIGCONT)
    await probe.passes("ready")
    assert await relay.stop() == 0
    assert probe() == 1
    assert "no process shows itself" in probe.said


async def test_a_worker_whose_loop_is_blocked_fails_it_and_the_log_says_by_what(
    ledger: Ledger, environment: dict[str, str], settings: Settings, processes: Processes, probe: Probe
) -> None:
    environment |= {"OUTBOX__TIME_LIMIT": "600000", "LOOP_HELD_AFTER": "2"}
    worker = await processes.worker(WORKER)
    await probe.passes()
    (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="block_for_ever"))
    async with relaying(settings):
        await probe.fails()
    [held] = [json.loads(line) for line in worker.log.read_text().splitlines() if '"loop.held"' in line]
    assert (held["consumer"], held["delivery_id"], held["after"]) == ("ledger.react", str(message_id), 2)
    assert held["at"].startswith("tests.proof.ledger.domain:")
    await worker.kill()


async def test_the_time_that_a_process_stood_still_is_not_blamed_on_what_it_runs(
    ledger: Ledger, environment: dict[str, str], settings: Settings, processes: Processes, probe: Probe
) -> None:
    environment |= {"OUTBOX__TIME_LIMIT": "600000", "LOOP_HELD_AFTER": "10"}
    worker = await processes.worker(WORKER)
    await probe.passes()
    [child] = children_that_work(worker, probe)
    await ledger.publish(domain.Happened(subject_id=uuid4(), how="block_for_ever"))
    async with relaying(settings):
        await until(lambda: time.time() - probe.touched() > 3)
        child.suspend()
        time.sleep(9)  # noqa: ASYNC251  the fault itself
        child.resume()
        resumed = time.monotonic()
        await until(lambda: worker.says("loop.held"))
        waited = time.monotonic() - resumed
    await worker.kill()
    assert waited > 5


async def test_a_busy_worker_passes_it(ledger: Ledger, settings: Settings, processes: Processes, probe: Probe) -> None:
    """A consumer that calculates leaves the others hardly any time."""
    await processes.worker(WORKER)
    await probe.passes()
    before = probe.touched()
    async with relaying(settings):
        (message_id,) = await ledger.publish(domain.Computed(subject_id=uuid4(), how="spin"))
        await until(lambda: is_state(ledger, message_id, "running"))
        await until(lambda: probe.touched() > before + 1)
        assert probe("ready") == 0
        assert await ledger.state(message_id) == "running"
        await until(lambda: is_state(ledger, message_id, "dead"))


async def test_an_outage_is_no_reason_to_be_restarted(
    own_ledger: Ledger, own_postgres: Postgres, processes: Processes, probe: Probe, tmp_path: Path
) -> None:
    await processes.relay()
    await processes.worker(WORKER)
    await until(lambda: probe("ready") == 0 and probe.said.count("is well") == 2, every=0.1)
    own_postgres.stop(mode="immediate")
    await until(lambda: probe("ready") == 1 and probe.said.count("is not connected") == 2, every=0.1)
    touched = {each: each.stat().st_mtime for each in probe.folder.iterdir()}
    assert len(touched) == 2
    await until(lambda: all(each.stat().st_mtime > before + 2 for each, before in touched.items()))
    assert probe("live") == 0
    own_postgres.start()
    await probe.passes("ready")


async def test_what_a_killed_process_left_says_nothing(processes: Processes, probe: Probe) -> None:
    killed = await processes.relay()
    await probe.passes()
    await killed.kill()
    [left] = probe.folder.iterdir()
    assert probe() == 1
    relay = await processes.relay()
    await probe.passes()
    os.utime(left, (0, 0))
    assert probe() == 0
    assert await relay.stop() == 0
    assert probe() == 1, "of nobody"


async def test_a_folder_that_cannot_be_written_stops_no_work(
    ledger: Ledger, settings: Settings, processes: Processes, probe: Probe
) -> None:
    worker = await processes.worker(WORKER, PROBE_FOLDER="/proc/none")
    await until(lambda: worker.says("probe.not_written"))
    async with relaying(settings):
        (message_id,) = await ledger.publish()
        await until(lambda: is_state(ledger, message_id, "completed"))
    assert probe() == 1
    assert worker.log.read_text().count("probe.not_written") == 1


def test_it_says_what_is_wrong_with_the_call(probe: Probe, environment: dict[str, str]) -> None:
    assert probe("alive") == 2
    del environment["PROBE_FOLDER"]
    assert (probe(), "PROBE_FOLDER" in probe.said) == (2, True)
