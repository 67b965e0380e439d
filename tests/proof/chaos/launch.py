"""How a process under attack is started: forked from the forge, unless its environment must be new from the start.

A new interpreter for each, as in `tests/servers/processes.py`, would take most of the time of a scenario in which
processes are killed all the time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, Self

from service.dev.places import ROOT
from tests.servers.real_servers import outside_environment

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Forge", "Forked", "Launched"]


class Launched(Protocol):
    """What the fleet needs of a process; `service.dev.processes.Process` is one, too."""

    environment: dict[str, str]

    @property
    def pid(self) -> int | None: ...
    @property
    def exit_code(self) -> int | None: ...
    def start(self) -> None: ...
    def ask_to_stop(self) -> None: ...
    def kill(self) -> None: ...


class Forge:
    """The process that everything is forked from. Enter it once for many scenarios."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.proof.chaos.forge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=outside_environment(),
            start_new_session=True,
        )
        assert self._read() == b"ready\n", "the forge did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def fork(self, argv: list[str], environment: Mapping[str, str], log: Path) -> int:
        """Start a process and return its id, which is also that of its group."""
        exits = log.with_suffix(".exits")
        request = json.dumps(
            {"argv": argv, "environment": dict(environment), "log": str(log), "exits": str(exits)}
        ).encode()
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(request + b"\n")
            self._process.stdin.flush()
            return int(self._read())


class Forked:
    """A process from the forge."""

    def __init__(self, forge: Forge, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._forge = forge
        self._argv = argv
        self.environment = dict(environment)
        self._log = log
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        if self._pid is not None and not _lives(self._pid):
            return None
        return self._pid

    @property
    def exit_code(self) -> int | None:
        """How it ended, once it has; negative for a signal."""
        if self._pid is None or _lives(self._pid):
            return None
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:  # it is collected a moment before that is written down
            with suppress(FileNotFoundError):
                for line in self._log.with_suffix(".exits").read_text().splitlines():
                    exit_ = json.loads(line)
                    if exit_["pid"] == self._pid:
                        return int(exit_["status"])
            time.sleep(0.01)
        return None

    def start(self) -> None:
        """Start it; whatever is left of its last life is killed first."""
        if self.pid is None:
            self.kill()
            self._pid = self._forge.fork(self._argv, self.environment, self._log)

    def ask_to_stop(self) -> None:
        """SIGTERM to the leader."""
        if (pid := self.pid) is not None:
            os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL the whole group."""
        if self._pid is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        while _lives(self._pid):
            time.sleep(0.005)
        self._pid = None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
