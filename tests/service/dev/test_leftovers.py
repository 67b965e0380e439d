"""What a test starts ends with it, whatever becomes of the test: runs of pytest in which something is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from service.dev.places import ROOT
from tests.waiting import until_sync

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

_CONFTEST = """
from tests.servers.leftovers import Leftovers

def pytest_configure(config):
    config.pluginmanager.register(Leftovers())
"""

# A worker's child: in a session of its own, deaf to SIGTERM, started through a shell that is gone.
_TESTS = """
import os, pathlib, subprocess, sys, time
import psutil
import pytest

HERE = pathlib.Path(__file__).parent
DEAF = "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); "
DEAF += "open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(600)"

def start(name):
    command = ["/bin/sh", "-c", '"$@" &', "sh", sys.executable, "-c", DEAF, str(HERE / name)]
    subprocess.run(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (HERE / name).exists() or not (HERE / name).read_text().endswith("\\n"):
        time.sleep(0.01)

def runs(name):
    try:
        return psutil.Process(int((HERE / name).read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

@pytest.fixture(scope="session")
def wide():
    start("wide")

def test_it(wide):
    start("left")
    if (how := os.environ["HOW"]) == "hang":
        (HERE / "runner").write_text(f"{os.getpid()}\\n")
        time.sleep(600)
    assert how != "fail"

def test_after(wide):
    assert runs("wide") and not runs("left")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_left.py").write_text(_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    return tmp_path


def started(folder: Path, how: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"HOW": how}, stdout=subprocess.PIPE, text=True)


def runs(folder: Path, name: str) -> bool:
    try:
        return psutil.Process(int((folder / name).read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(("how", "counts"), [("pass", "2 passed, 1 error"), ("fail", "1 failed, 1 passed, 1 error")])
def test_what_a_test_leaves_running_is_ended_and_named(folder: Path, how: str, counts: str) -> None:
    out, _ = started(folder, how).communicate()
    assert counts in out
    assert "it left running" in out
    assert not runs(folder, "left")
    assert not runs(folder, "wide")


@pytest.mark.parametrize("method", ["signal", "thread"])
def test_a_time_out_ends_it(folder: Path, method: str) -> None:
    """The second method ends the process without asking fixtures."""
    out, _ = started(folder, "hang", "--timeout=4", f"--timeout-method={method}").communicate()
    assert "Timeout" in out
    until_sync(lambda: not runs(folder, "left") and not runs(folder, "wide"))


@pytest.mark.parametrize("arguments", [(), ("-n", "1")], ids=["alone", "with a worker of xdist"])
def test_a_killed_run_leaves_nothing(folder: Path, arguments: tuple[str, ...]) -> None:
    run = started(folder, "hang", *arguments)
    until_sync((folder / "runner").exists)
    run.kill()
    run.communicate()
    until_sync(lambda: not any(runs(folder, each) for each in ("left", "wide", "runner")))


def test_a_killed_worker_of_xdist_leaves_nothing(folder: Path) -> None:
    run = started(folder, "hang", "-n", "1", "--max-worker-restart=0")
    until_sync(lambda: (folder / "runner").exists() and (folder / "runner").read_text().endswith("\n"))
    os.kill(int((folder / "runner").read_text()), signal.SIGKILL)
    until_sync(lambda: not runs(folder, "left"))
    out, _ = run.communicate()
    assert "crashed" in out
