"""The service's own processes: started together, their output prefixed, ended in order and by their process ids.

What must stay true: nothing started here outlives us. Each process leads a group of its own, so that Ctrl-C reaches
only us and we stop the API before the workers and both before the servers; whatever is left of a group when its
leader has ended is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from service.dev.guard import Guard
from service.dev.places import ROOT
from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    Write = Callable[[str, str], None]
    """Takes a process's name and a line of its output."""

_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_TAB = "\t"
_LONGEST_PAUSE = 10.0
_HEALTHY_AFTER = 30.0
_RESTART_WITHIN = 5.0
"""Seconds a process has to stop before it starts again; then it is killed, which no event minds."""


def to_terminal(names: Iterable[str], stream: TextIO | None = None) -> Write:
    """Write lines with their process's name in front, in colour where the stream is a terminal."""
    out = stream or sys.stdout
    ordered = list(names)
    width = max(map(len, ordered), default=0)
    coloured = out.isatty() and "NO_COLOR" not in os.environ
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(ordered)}
    lock = threading.Lock()

    def write(name: str, line: str) -> None:
        prefix = f"{name:<{width}} |"
        if coloured:
            prefix = f"\033[{colours.get(name, 0)}m{prefix}\033[0m"
        # The terminal may be gone already while the last lines of stopping processes arrive.
        with lock, suppress(OSError, ValueError):
            out.write(f"{prefix} {visible(line, keep=_TAB)}\n")
            out.flush()

    return write


class Process:
    """One process of the service.

    Args:
        name: Shown before its output.
        command: What to run.
        environment: Its whole environment.
        write: Takes its output line by line.
        stop_after: Seconds it may take to stop before it is killed.
        cwd: Its working folder, where the service looks for `.env`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        write: Write,
        *,
        stop_after: float = 30,
        cwd: Path = ROOT,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.environment = dict(environment)
        self.stop_after = stop_after
        self.cwd = cwd
        self.write = write
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._guard: Guard | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs; also that of its group."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.pid is not None:
            return
        self.kill()
        self._process = subprocess.Popen(
            self.command,
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self._guard = Guard.ending(self._process.pid)
        self._reader = threading.Thread(target=self._read, args=(self._process,), name=f"log-{self.name}", daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with suppress(ValueError):  # closed by `kill`
            for line in process.stdout:
                self.write(self.name, line.decode(errors="replace").rstrip())

    def ask_to_stop(self) -> None:
        """Send SIGTERM, to the leader alone: Dramatiq's master passes it on, and a second one would be a hard stop."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait for it to end, and kill it when it takes longer than `stop_after`."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_after)
        self.kill()

    def stop(self) -> None:
        """End it in good order."""
        self.ask_to_stop()
        self.wait()

    def kill(self) -> None:
        """Kill it and whatever is left of its group."""
        process = self._process
        if process is None:
            return
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._reader is not None:
            self._reader.join(timeout=2)
        if process.stdout is not None:
            process.stdout.close()
        self._reader = self._process = None


def stop_all(processes: Iterable[Process]) -> None:
    """Stop several processes at the same time."""
    stopping = list(processes)
    for process in stopping:
        process.ask_to_stop()
    for process in stopping:
        process.wait()


class Supervisor:
    """Restarts processes that end by themselves, each after a pause that grows while it keeps failing.

    Nothing here waits for a process to stop, so that whoever calls `look` stays quick.
    """

    def __init__(self, processes: Iterable[Process]) -> None:
        self._processes = list(processes)
        self._started = {process.name: time.monotonic() for process in self._processes}
        self._pause = {process.name: 1.0 for process in self._processes}
        self._due: dict[str, float] = {}
        self._stopping: dict[str, float] = {}

    def look(self) -> None:
        """Look at every process once; call it a few times a second."""
        for process in self._processes:
            if process.name in self._stopping:
                self._start_stopped(process)
            elif process.pid is None:
                self._attend(process)

    def restart(self, processes: Iterable[Process]) -> None:
        """Ask processes to stop. `look` starts each as soon as it has, without a pause even if it kept failing."""
        for process in processes:
            if process.name not in self._stopping:  # one that stops already will read what is new: ask only once
                process.ask_to_stop()
                self._stopping[process.name] = time.monotonic() + _RESTART_WITHIN

    def _start_stopped(self, process: Process) -> None:
        now = time.monotonic()
        if process.pid is not None and now < self._stopping[process.name]:
            return
        process.kill()
        del self._stopping[process.name]
        self._due.pop(process.name, None)
        self._pause[process.name] = 1.0
        self._started[process.name] = now
        process.start()

    def _attend(self, process: Process) -> None:
        now = time.monotonic()
        due = self._due.get(process.name)
        if due is None:
            if now - self._started[process.name] > _HEALTHY_AFTER:
                self._pause[process.name] = 1.0
            pause = self._pause[process.name]
            self._due[process.name] = now + pause
            self._pause[process.name] = min(pause * 2, _LONGEST_PAUSE)
            process.write(
                process.name, f"-- ended with {_describe(process.exit_code)}; starts again in {pause:.0f} s --"
            )
        elif now >= due:
            del self._due[process.name]
            self._started[process.name] = now
            process.start()


def _describe(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"
