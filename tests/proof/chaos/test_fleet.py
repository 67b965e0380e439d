"""The suite sees a process that dies of itself or does not end when told, and what comes after all was well."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.proof.chaos.__main__ import _summary
from tests.proof.chaos.checker import Verdict
from tests.proof.chaos.fleet import Fleet
from tests.proof.chaos.launch import Forked
from tests.proof.chaos.logs import is_traceback, leaks
from tests.proof.chaos.scenario import Result, Scenario, run
from tests.proof.chaos.world import Plan, World
from tests.waiting import until, until_sync

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.proof.chaos.scenario import Attack
    from tests.proof.chaos.world import Ground

pytestmark = pytest.mark.slow

_READY = "import os, signal, sys, time; print('relay.started', flush=True)"
_WAITS = f"{_READY}; time.sleep(60)"
_ENDS_WELL = f"{_READY}; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"
_ENDS_BADLY = f"{_READY}; signal.signal(15, lambda *_: sys.exit(1)); time.sleep(60)"
_DOES_NOT_END = f"{_READY}; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
_TAKES_A_MOMENT = f"""{_READY}
def end(*_):
    signal.signal(15, lambda *_: os._exit(1))
    print('ending', flush=True)
    time.sleep(0.5)
    sys.exit(0)
signal.signal(15, end)
time.sleep(60)"""
_DIES = f"{_READY}; time.sleep(0.5); sys.exit(3)"


@pytest.fixture
async def fleet(tmp_path: Path, ground: Ground) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path, ground.forge, killed_itself=set, may_exit=0, time_to_stop=2)
    yield fleet
    await fleet.close()


async def _start(fleet: Fleet, program: str) -> None:
    fleet.add("relay-1", ["python", "-c", program], {"PATH": os.environ["PATH"]}, forked=False)
    await fleet.start("relay-1")


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        (_ENDS_WELL, []),
        (_ENDS_BADLY, ["relay-1 ended with 1 after SIGTERM"]),
        (_WAITS, ["relay-1 ended with -15 after SIGTERM"]),
        (_DOES_NOT_END, ["relay-1 went on for 2 s after SIGTERM"]),
    ],
)
async def test_how_a_process_ends_when_told(fleet: Fleet, program: str, wrong: list[str]) -> None:
    await _start(fleet, program)
    await fleet.stop("relay-1")
    assert fleet.wrong == wrong


async def test_a_process_that_dies_of_itself_is_wrong(fleet: Fleet) -> None:
    await _start(fleet, _DIES)
    await until(lambda: fleet.wrong)
    assert fleet.wrong[0] == "relay-1 ended with 3 by itself"


async def test_a_process_is_told_to_end_only_once(fleet: Fleet) -> None:
    await _start(fleet, _TAKES_A_MOMENT)
    fleet.terminate("relay-1")
    await until(lambda: "ending" in fleet.log("relay-1"))
    await fleet.stop("relay-1")
    assert fleet.wrong == []


async def test_a_process_that_the_suite_killed_is_not(fleet: Fleet) -> None:
    await _start(fleet, _ENDS_WELL)
    before = fleet.leader("relay-1")
    fleet.kill("relay-1")
    await until(lambda: fleet.leader("relay-1") not in (before, frozenset()), what="a new process")
    assert fleet.wrong == []
    await until(lambda: fleet.log("relay-1").count("relay.started") == 2)


def test_the_forge_tells_how_a_process_ended(tmp_path: Path, ground: Ground) -> None:
    process = Forked(ground.forge, ["no.such.module"], {}, tmp_path / "worker-1.log")
    process.start()
    until_sync(lambda: process.pid is None)
    assert process.exit_code == 70
    sleeping = Forked(ground.forge, ["http.server", "0"], {}, tmp_path / "worker-2.log")
    sleeping.start()
    assert sleeping.exit_code is None
    assert sleeping.pid is not None
    os.kill(sleeping.pid, signal.SIGKILL)
    until_sync(lambda: sleeping.pid is None)
    assert sleeping.exit_code == -signal.SIGKILL


def test_an_unexpected_traceback_is_found() -> None:
    raised = {"event": "http.unhandled", "logger": "service.http", "exception": "Traceback (most recent call last):\n"}
    assert is_traceback(json.dumps(raised))
    assert is_traceback("Traceback (most recent call last):")
    assert is_traceback(json.dumps({"event": "Task exception was never retrieved", "logger": "asyncio"}))
    assert is_traceback(json.dumps(raised | {"event": "Failed to process message a(1)", "logger": "dramatiq.worker"}))
    assert not is_traceback(json.dumps(raised | {"event": "outbox.failed"}))
    assert not is_traceback(json.dumps(raised | {"logger": "dramatiq.worker.ConsumerThread"}))
    given_up = "Future exception was never retrieved\nfuture: <Future finished exception=ConnectionError('{}')>"
    assert not is_traceback(
        json.dumps({"event": given_up.format("unexpected connection_lost() call"), "logger": "asyncio"})
    )
    assert is_traceback(json.dumps({"event": given_up.format("of ours"), "logger": "asyncio"}))
    assert not is_traceback(json.dumps({"event": "relay.started", "logger": "relay.process.loop"}))


def test_a_password_in_a_log_is_found() -> None:
    url = "postgresql://postgres:s3cr3t@127.0.0.1:5432/service"
    assert leaks("cannot connect as postgres:s3cr3t", url)
    assert not leaks("cannot connect as postgres", url)


def test_a_sweep_that_takes_long_says_so_and_fails_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert _summary([], took=1201, allowed=1200) == 0
    assert "it took longer than 20 minutes" in capsys.readouterr().out
    assert _summary([], took=1199, allowed=1200) == 0
    assert "longer" not in capsys.readouterr().out


def test_the_last_lines_name_what_failed_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    async def attack(_world: World) -> None: ...

    def result(name: str, verdict: Verdict, *wrong: str) -> Result:
        which = Scenario(name, attack, Plan(), 0, 20, False, "", None, 30, 30, lambda: True)
        return Result(which, 1, verdict, wrong=list(wrong))

    failed = [
        result("well", Verdict()),
        result("loses", Verdict(lost=["a", "b"], unfinished=3)),
        result("hangs", Verdict(), "TimeoutError:\n", "more"),
    ]
    assert _summary(failed, took=1, allowed=2) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "lost=2 duplicated=0 disordered=0 over_limit=0",
        "FAILED: loses: 2 lost, 3 still open",
        "FAILED: hangs: TimeoutError:",
    ]
    assert _summary(failed[:1], took=1, allowed=2) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "lost=0 duplicated=0 disordered=0 over_limit=0"


def _attacked(attack: Attack, folder: Path, ground: Ground, lasts: float = 30) -> Result:
    return asyncio.run(
        run(Scenario("attack", attack, Plan(), 0, 20, False, "", None, lasts, 30, lambda: True), 1, folder, ground)
    )


def test_what_happens_again_after_all_was_well_is_seen(server_folder: Path, ground: Ground) -> None:
    async def again_later(world: World) -> None:
        await world.place_surely()

        async def clean() -> bool:
            return (await world.verdict()).clean

        async def repeat() -> None:
            await until(clean)
            await asyncio.sleep(1)  # until that has been seen by whoever judges
            reader, writer = await asyncio.open_connection("127.0.0.1", world.sink.port)
            first = world.sink.received[0]
            document = {"key": first.key, "subject": first.subject, "consumer": first.consumer, "attempt": 1, "pid": 1}
            writer.write(json.dumps(document | {"began": 0.0}).encode() + b"\n")
            assert await reader.readline() == b"ok\n"
            writer.close()

        world.in_background(repeat())

    result = _attacked(again_later, server_folder, ground)
    assert result.wrong == []
    assert len(result.verdict.duplicated) == 1


def test_an_attack_that_hangs_has_failed(server_folder: Path, ground: Ground) -> None:
    async def hang(_world: World) -> None:
        await asyncio.Event().wait()

    result = _attacked(hang, server_folder, ground, lasts=1)
    assert result.wrong[0].startswith("TimeoutError")
    assert not result.passed
