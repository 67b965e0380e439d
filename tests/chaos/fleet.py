"""The processes under attack, and a supervisor that starts again whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from service.dev.places import ROOT
from service.dev.processes import Process
from tests.chaos.checker import Fault
from tests.chaos.launch import Forked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.launch import Forge, Launched

__all__ = ["Fleet", "command"]

_RESTART_AFTER = 0.3
_READY = {"api": "Application startup complete", "relay": "relay.started", "worker": "ready for action"}
_BROKER = "tests.chaos.app:setup_broker"


def command(name: str, port: int = 0) -> list[str]:
    """What a process of this name runs: a program of the virtual environment, or a module, and its arguments."""
    match name.partition("-")[0]:
        case "api":
            return ["uvicorn", "tests.chaos.app:create_app", "--factory", "--host", "127.0.0.1", "--port", str(port)]
        case "relay":
            return ["outbox", "relay"]
        case "worker":
            return ["dramatiq", _BROKER, "-p", "1", "-t", "4"]
    raise ValueError(name)


class Fleet:
    """Named processes. What is done to a worker is written down in `faults`: it may explain a repeated effect."""

    def __init__(self, folder: Path, forge: Forge) -> None:
        self.faults: list[Fault] = []
        self._folder = folder
        self._forge = forge
        self._processes: dict[str, Launched] = {}
        self._wanted: set[str] = set()
        self._stopped: dict[int, tuple[str, float]] = {}
        self._known: dict[str, frozenset[int]] = {}
        self._task: asyncio.Task[None] | None = None

    def add(self, name: str, argv: list[str], environment: Mapping[str, str], *, forked: bool = True) -> None:
        """A process, not yet started; forked from the forge, or started by its own command."""
        log = self._folder / f"{name}.log"
        if forked:
            self._processes[name] = Forked(self._forge, argv, environment, log)
            return

        def write(_name: str, line: str) -> None:
            with log.open("a") as file:
                file.write(line + "\n")

        program = str(Path(sys.executable).with_name(argv[0]))
        self._processes[name] = Process(name, [program, *argv[1:]], environment, write, stop_after=15, cwd=ROOT)

    def names(self, kind: str = "") -> list[str]:
        """Processes whose name begins with `kind`."""
        return [name for name in self._processes if name.startswith(kind)]

    async def start(self, *names: str) -> None:
        """Start processes and keep them running; returns when each is ready for work."""
        before = {name: self._said(name) for name in names}
        for name in names:
            self._wanted.add(name)
            self._processes[name].start()
        if self._task is None:
            self._task = asyncio.create_task(self._supervise())
        deadline = time.monotonic() + 90
        while any(self._said(name) == before[name] for name in names):
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready: {[name for name in names if self._said(name) == before[name]]}")
            await asyncio.sleep(0.05)

    def _said(self, name: str) -> int:
        with suppress(FileNotFoundError):
            return self.log(name).count(_READY[name.partition("-")[0]])
        return 0

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self._folder / f"{name}.log").read_text()

    async def stop(self, *names: str) -> None:
        """End processes in good order, and leave them ended."""
        self._wanted.difference_update(names)
        processes = [self._processes[name] for name in names]
        for process in processes:
            process.ask_to_stop()
        await asyncio.gather(*(asyncio.to_thread(process.wait) for process in processes))

    async def close(self) -> None:
        """End everything."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()  # raises what ended the supervisor
        self.resume()
        await self.stop(*self._processes)

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for name in list(self._wanted):
                process = self._processes[name]
                if process.pid is not None:
                    self._known[name] = self.pids(name)
                    continue
                # Long enough for orphans of a killed master to do some harm.
                await asyncio.sleep(_RESTART_AFTER)
                if name in self._wanted:
                    self._blame(name, "died", self._known.get(name, frozenset()))
                    await asyncio.to_thread(process.start)

    def pids(self, name: str) -> frozenset[int]:
        """The process and all its children."""
        pid = self._processes[name].pid
        return frozenset() if pid is None else frozenset([pid, *_offspring(pid)])

    def leader(self, name: str) -> frozenset[int]:
        """Only the process itself: Dramatiq's master, of a worker."""
        pid = self._processes[name].pid
        return frozenset() if pid is None else frozenset([pid])

    def children(self, name: str) -> frozenset[int]:
        """Only its children: what runs consumers, of a worker."""
        return self.pids(name) - self.leader(name)

    def _blame(self, name: str, what: str, pids: frozenset[int], began: float | None = None) -> None:
        if name.startswith("worker"):
            self.faults.append(Fault(what, began or time.time() - 1, time.time(), pids))

    def kill(self, name: str, pids: frozenset[int] | None = None) -> None:
        """SIGKILL a process with its children, or only some of them."""
        everything = self.pids(name)
        for pid in everything if pids is None else pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._blame(name, "killed", everything)

    def terminate(self, name: str) -> None:
        """SIGTERM the leader; the supervisor starts it again when it has ended."""
        self._processes[name].ask_to_stop()

    def freeze(self, name: str) -> None:
        """SIGSTOP a process with its children, until `resume`."""
        for pid in self.pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self._stopped[pid] = (name, time.time())

    def resume(self) -> None:
        """SIGCONT everything that is stopped, whoever stopped it."""
        now = time.time()
        for name in self._processes:
            for pid in self.pids(name):
                _, since = self._stopped.pop(pid, (name, now - 5))
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if process.status() == psutil.STATUS_STOPPED:
                        process.send_signal(signal.SIGCONT)
                        self._blame(name, "frozen", frozenset([pid]), since)


def _offspring(pid: int) -> list[int]:
    try:
        children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*children, *(each for child in children for each in _offspring(child))]
    except OSError:  # it has gone, or this is no Linux, where psutil has to look at every process there is
        with suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return []
