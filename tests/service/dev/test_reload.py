"""Reload on save: what counts as a change, and processes that run the saved code, a broken one included."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from service.dev import stack, up
from service.dev.processes import Process, Supervisor
from service.dev.reload import Watch, shown
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PROGRAM = "import os, time\nprint({version!r}, os.environ.get('COLOUR'), flush=True)\ntime.sleep(600)\n"
_DEAF = "import signal\nsignal.signal(15, signal.SIG_IGN)\n" + _PROGRAM


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for folder in ("service/dev", "service/domains/orders", "relay/process", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def api(clone: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """A program of the clone, which `make dev` takes for its API."""
    monkeypatch.setattr(stack, "ROOT", clone)
    (clone / "service" / "program.py").write_text(_PROGRAM.format(version=1))
    command = [sys.executable, str(clone / "service" / "program.py")]
    given = os.environ | dict.fromkeys((*stack.URLS, "SMTP__URL"), "given")
    process = Process("api", command, given, lambda _, line: lines.append(line), cwd=clone)
    yield process
    process.kill()


@pytest.fixture
def look(clone: Path, api: Process) -> Callable[[], None]:
    """What `make dev` does a few times a second."""
    watch, supervisor = Watch(clone, period=0), Supervisor([api])
    api.start()
    return lambda: up.look(watch, [api], supervisor)


@pytest.mark.parametrize(
    "name", ["service/api.py", "service/domains/orders/routes.py", "relay/process/loop.py", ".env"]
)
def test_a_new_a_saved_and_a_removed_file_are_changes(clone: Path, name: str) -> None:
    watch, file = Watch(clone, period=0), clone / name
    file.write_text("a = 1\n")
    assert watch.changed() == [name]
    assert watch.changed() == []
    os.utime(file, ns=(0, 0))
    assert watch.changed() == [name]
    file.unlink()
    assert watch.changed() == [name]


@pytest.mark.parametrize("name", ["service/dev/up.py", "tests/test_a.py", "service/notes.md", "service/.api.py.swp"])
def test_what_no_process_reads_is_no_change(clone: Path, name: str) -> None:
    watch = Watch(clone, period=0)
    (clone / name).write_text("")
    (clone / "service" / ".#api.py").symlink_to("nobody@nowhere")
    assert watch.changed() == []


def test_what_changed_is_one_line() -> None:
    assert shown(["relay/a\nb.py"]) == "relay/a\\nb.py"
    assert shown(["relay/a.py", "relay/b.py", "relay/c.py"]) == "relay/a.py and 2 more"


def _says(look: Callable[[], None], lines: list[str], line: str) -> None:
    def said() -> bool:
        look()
        return line in lines

    until_sync(said, what=line)


def test_a_saved_file_runs_at_once_and_a_broken_one_as_soon_as_it_is_mended(
    clone: Path, api: Process, look: Callable[[], None], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program = clone / "service" / "program.py"
    _says(look, lines, "1 None")
    first = api.pid
    program.write_text(_PROGRAM.format(version=2))
    _says(look, lines, "2 None")
    assert api.pid != first
    assert "-- service/program.py changed: api starts again --" in capsys.readouterr().out
    assert not [line for line in lines if "ended with" in line], "it was not a failure"
    program.write_text("def broken(:\n")
    _says(look, lines, "-- ended with exit status 1; starts again in 2 s --")
    program.write_text(_PROGRAM.format(version=3))
    _says(look, lines, "3 None")


def test_a_mended_file_does_not_wait_for_the_pause() -> None:
    failing = Process("failing", [sys.executable, "-c", "raise SystemExit(3)"], os.environ, lambda _, line: None)
    supervisor = Supervisor([failing])
    failing.start()
    until_sync(lambda: failing.pid is None)
    supervisor._pause["failing"] = 1000.0
    supervisor.look()
    failing.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    supervisor.restart([failing])
    supervisor.look()
    started, pause = failing.pid, supervisor._pause["failing"]
    failing.kill()
    assert started is not None
    assert pause == 1.0


def test_a_process_that_does_not_stop_holds_nobody_up(
    clone: Path, api: Process, look: Callable[[], None], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = clone / "service" / "program.py"
    program.write_text(_DEAF.format(version="deaf"))
    _says(look, lines, "deaf None")
    deaf = api.pid
    monkeypatch.setattr("service.dev.processes._RESTART_WITHIN", 1000.0)
    program.write_text(_PROGRAM.format(version=2))
    look()
    assert api.pid == deaf, "`look` came back before it stopped"
    monkeypatch.setattr("service.dev.processes.time.monotonic", lambda: 1e12)
    _says(look, lines, "2 None")


def test_what_env_sets_counts_at_once_but_where_the_servers_are_stays(
    clone: Path, api: Process, look: Callable[[], None], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _says(look, lines, "1 None")
    (clone / ".env").write_text("COLOUR=red\nBROKER__URL=redis://other\n")
    _says(look, lines, "1 red")
    assert api.environment["BROKER__URL"] == "given"
    assert "-- BROKER__URL: counts from the next `make dev` on --" in capsys.readouterr().out
    (clone / ".env").write_bytes(b"COLOUR=\xff\n")
    look()
    assert ".env cannot be read" in capsys.readouterr().out
    (clone / ".env").write_text("COLOUR=green\n")
    _says(look, lines, "1 green")
