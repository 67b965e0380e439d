"""Processes of the stack: prefixed output, an orderly end, nothing left of a group, and restarts with a pause."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from service.dev.processes import Process, Supervisor, stop_all, to_terminal
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

Lines = list[tuple[str, str]]

# A leader with a child, as Dramatiq's master has workers. Both say when they are asked to stop.
_FAMILY = """
import signal, subprocess, sys, time
if len(sys.argv) == 1:
    child = subprocess.Popen([sys.executable, __file__, "child"])
    print("child", child.pid, flush=True)
def stop(number, frame):
    print("asked", *sys.argv[1:], flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", *sys.argv[1:], flush=True)
time.sleep(600)
"""


@pytest.fixture
def lines() -> Lines:
    return []


@pytest.fixture
def family(tmp_path_factory: pytest.TempPathFactory, lines: Lines) -> Iterator[Process]:
    script = tmp_path_factory.mktemp("family") / "family.py"
    script.write_text(_FAMILY)
    write = lambda name, line: lines.append((name, line))  # noqa: E731
    process = Process("family", [sys.executable, str(script)], os.environ, write, stop_after=10)
    yield process
    process.kill()


def test_what_a_process_says_does_not_steer_the_terminal() -> None:
    out = io.StringIO()
    to_terminal(["api"], out)("api", "a\tb \x1b[2J\u202e\x9b31m\r")
    assert out.getvalue() == "api | a\tb \\x1b[2J\\u202e\\x9b31m\\r\n"


def _child(lines: Lines) -> int:
    until_sync(lambda: {("family", "ready"), ("family", "ready child")} <= set(lines))
    return next(int(line.split()[1]) for _, line in lines if line.startswith("child "))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_only_the_leader_is_asked_to_stop_and_nothing_of_the_group_is_left(family: Process, lines: Lines) -> None:
    family.start()
    child = _child(lines)
    family.stop()
    assert ("family", "asked") in lines
    assert ("family", "asked child") not in lines
    assert until_sync(lambda: not _runs(child))
    assert family.pid is None


def test_a_process_that_does_not_stop_is_killed(lines: Lines) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    write = lambda name, line: lines.append((name, line))  # noqa: E731
    process = Process("deaf", [sys.executable, "-c", deaf], os.environ, write, stop_after=0.5)
    process.start()
    until_sync(lambda: ("deaf", "ready") in lines)
    pid, began = process.pid, time.monotonic()
    stop_all([process])
    assert time.monotonic() - began < 60
    assert pid is not None
    assert not _runs(pid)


def test_a_process_is_out_of_reach_of_ctrl_c(family: Process, lines: Lines) -> None:
    family.start()
    child = _child(lines)
    assert family.pid is not None
    assert os.getpgid(family.pid) == os.getpgid(child) == family.pid != os.getpgid(0)


def test_the_supervisor_starts_a_dead_process_again(
    family: Process, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.start()
    supervisor = Supervisor([family])
    first, child = family.pid, _child(lines)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    began = time.monotonic()

    def restarted() -> bool:
        supervisor.look()
        return family.pid not in (None, first)

    assert until_sync(restarted)
    assert time.monotonic() - began > 0.9, "it is not restarted without a pause"
    until_sync(lambda: not _runs(child), what="the end of what its leader left behind")
    assert ("family", "-- ended with SIGKILL; starts again in 1 s --") in lines


def test_the_pause_grows_while_a_process_keeps_failing(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("service.dev.processes.time.monotonic", lambda: now)
    write = lambda name, line: lines.append((name, line))  # noqa: E731
    failing = Process("failing", [sys.executable, "-c", "raise SystemExit(3)"], os.environ, write)
    supervisor = Supervisor([failing])
    failing.start()
    for _ in range(6):
        assert failing._process is not None
        failing._process.wait()
        supervisor.look()
        now += 11
        supervisor.look()
    failing.kill()
    pauses = [line for _, line in lines]
    assert [line.split()[-3] for line in pauses] == ["1", "2", "4", "8", "10", "10"]
    assert "exit status 3" in pauses[0]


_STARTS_A_PROCESS = """
import os, sys, time
from service.dev.processes import Process
process = Process("sleeper", ["sleep", "600"], os.environ, lambda name, line: None)
process.start()
print(process.pid, flush=True)
time.sleep(600)
"""


def test_processes_end_when_their_starter_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _STARTS_A_PROCESS], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert _runs(pid)
        starter.kill()
    assert until_sync(lambda: not _runs(pid))


def test_output_is_prefixed_and_aligned() -> None:
    stream = io.StringIO()
    write = to_terminal(["api", "relay-1"], stream)
    write("api", "up")
    write("relay-1", "up")
    assert stream.getvalue() == "api     | up\nrelay-1 | up\n"
