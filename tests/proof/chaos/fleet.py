"""The processes under attack, and a supervisor that starts again whatever dies.

What must stay true: every death has a cause that the suite knows. What it did not kill, did not ask to end and was not
told of in a strike's note died by a fault of its own, and that is `wrong`, however well the system outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from service.dev.places import ROOT
from service.dev.processes import Process
from tests.proof.chaos.checker import Fault
from tests.proof.chaos.launch import Forked

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.proof.chaos.launch import Forge, Launched

__all__ = ["Fleet", "command"]

_RESTART_AFTER = 0.3
_READY = {"api": "Application startup complete", "relay": "relay.started", "worker": "ready for action"}
_IN_GOOD_ORDER = {"api": (0, -signal.SIGTERM), "relay": (0,), "worker": (0,)}
"""Exit statuses after SIGTERM. Uvicorn sends itself the signal again when it has stopped."""
_BROKER = "tests.proof.chaos.app:setup_broker"


def command(name: str, port: int, processes: int, grace: float) -> list[str]:
    """What a process of this name runs: a program of the virtual environment, or a module, and its arguments.

    `grace`: seconds for which a worker that is told to end lets consumers finish; Dramatiq must wait a little longer.
    """
    match name.partition("-")[0]:
        case "api":
            application = [
                "tests.proof.chaos.app:create_app",
                "--factory",
                "--http",
                "service.http.protocol:BoundedProtocol",
            ]
            return ["uvicorn", *application, "--host", "127.0.0.1", "--port", str(port)]
        case "relay":
            return ["outbox", "relay"]
        case "worker":
            # The master hears no signal while it waits for a process to boot, be it one that was killed meanwhile.
            patience = ["--worker-shutdown-timeout", str(int(grace * 1250)), "--worker-fork-timeout", "5000"]
            return ["dramatiq", _BROKER, "-p", str(processes), "-t", "4", *patience]
    raise ValueError(name)


class Fleet:
    """Named processes.

    Attributes:
        faults: What was done to workers: it may explain a repeated effect.
        wrong: Processes that ended by themselves, or not when and as they were told.
    """

    def __init__(
        self,
        folder: Path,
        forge: Forge,
        killed_itself: Callable[[], set[tuple[str, int]]],
        may_exit: int,
        time_to_stop: float,
    ) -> None:
        """A fleet without processes.

        Args:
            folder: Where they write their logs.
            forge: What they are forked from.
            killed_itself: The names of which a note says so, each with the number of its start.
            may_exit: A status that is no fault, beside 0.
            time_to_stop: Seconds after SIGTERM; who then still runs is killed.
        """
        self.faults: list[Fault] = []
        self.wrong: list[str] = []
        self._folder = folder
        self._forge = forge
        self._killed_itself = killed_itself
        self._may_exit = may_exit
        self._time_to_stop = time_to_stop
        self._processes: dict[str, Launched] = {}
        self._wanted: set[str] = set()
        self._asked: set[str] = set()
        self._killed: set[int] = set()
        self._starts: Counter[str] = Counter()
        self._stopped: dict[int, float] = {}
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
        self._processes[name] = Process(name, [program, *argv[1:]], environment, write, cwd=ROOT)

    def names(self, kind: str = "") -> list[str]:
        """Processes whose name begins with `kind`."""
        return [name for name in self._processes if name.startswith(kind)]

    async def start(self, *names: str) -> None:
        """Start processes and keep them running; returns when each is ready for work."""
        before = {name: self._said(name) for name in names}
        for name in names:
            self._wanted.add(name)
            self._launch(name)
        if self._task is None:
            self._task = asyncio.create_task(self._supervise())
        deadline = time.monotonic() + 180
        while any(self._said(name) == before[name] for name in names):
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready: {[name for name in names if self._said(name) == before[name]]}")
            await asyncio.sleep(0.05)

    def _launch(self, name: str) -> None:
        self._starts[name] += 1
        self._processes[name].environment["CHAOS_START"] = str(self._starts[name])
        self._processes[name].start()

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
        running = [name for name in names if self._processes[name].pid is not None]
        self._note_deaths(*(set(names) - set(running)))
        for name in running:
            self._remember(name)
            self.terminate(name)
        await asyncio.to_thread(self._see_ended, running)
        for name in names:
            await asyncio.to_thread(self._processes[name].kill)

    def _see_ended(self, names: Sequence[str]) -> None:
        deadline = time.monotonic() + self._time_to_stop
        while any(self._processes[name].pid is not None for name in names) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._note_deaths(*names)

    async def close(self) -> None:
        """End everything."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait((task,))
            if not task.cancelled():
                task.result()  # raises what ended the supervisor
        await self.stop(*self._processes)

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            for name in list(self._wanted):
                if self._processes[name].pid is not None:
                    self._remember(name)
                    continue
                # Long enough for orphans of a killed master to do some harm.
                await asyncio.sleep(_RESTART_AFTER)
                if name in self._wanted:
                    await asyncio.to_thread(self._note_deaths, name)
                    await asyncio.to_thread(self._launch, name)

    def _remember(self, name: str) -> None:
        """Every process that belongs to this start of it, also a child that has ended since."""
        self._known[name] = self._known.get(name, frozenset()) | self.pids(name)

    def _note_deaths(self, *names: str) -> None:
        """See why each has ended; what is left of its group is about to be killed."""
        for name in names:
            process, pids, asked = self._processes[name], self._known.pop(name, frozenset()), name in self._asked
            self._asked.discard(name)
            if process.pid is not None:
                self.wrong.append(f"{name} went on for {self._time_to_stop:.0f} s after SIGTERM")
                self._blame(name, "killed at last", pids)
            elif pids:  # otherwise its end was looked into before
                self._look_into(name, process.exit_code, pids, asked=asked)

    def _look_into(self, name: str, status: int | None, pids: frozenset[int], *, asked: bool) -> None:
        if pids & self._killed or (name, self._starts[name]) in self._killed_itself():
            # A master ends the siblings of a killed child in good order. Its own orphans have no such luck.
            if orphans := frozenset(pid for pid in pids if _lives(pid)):
                self._blame(name, "killed with its master", orphans)
        elif self._may_exit and status == self._may_exit:
            self._blame(name, f"ended with {status}", pids, time.time() - 3)
        elif not (asked and status in _IN_GOOD_ORDER[name.partition("-")[0]]):
            self.wrong.append(f"{name} ended with {status}" + (" after SIGTERM" if asked else " by itself"))

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
            now = time.time()
            self.faults.append(Fault(what, now if began is None else began, now, pids))

    def kill(self, name: str, pids: frozenset[int] | None = None) -> None:
        """SIGKILL a process with its children, or only some of them."""
        everything = self.pids(name)
        victims = everything if pids is None else pids
        self._killed |= victims
        self._remember(name)
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._blame(name, "killed", victims)

    def terminate(self, name: str) -> None:
        """SIGTERM the leader; the supervisor starts it again when it has ended, if it is wanted.

        Only once in its life: Dramatiq takes a second one for an order to drop everything.
        """
        if name not in self._asked:
            self._asked.add(name)
            self._processes[name].ask_to_stop()

    def freeze(self, name: str) -> None:
        """SIGSTOP a process with its children, until `resume`."""
        for pid in self.pids(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self._stopped[pid] = time.time()

    def resume(self, stopped_themselves: Mapping[int, float]) -> None:
        """SIGCONT everything that is stopped, whoever stopped it: of those who did it themselves, when."""
        for name in self._processes:
            for pid in self.pids(name):
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if process.status() == psutil.STATUS_STOPPED:
                        since = self._stopped.pop(pid, None) or stopped_themselves[pid]
                        self._blame(name, "frozen", frozenset([pid]), since)
                        process.send_signal(signal.SIGCONT)


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _offspring(pid: int) -> list[int]:
    try:
        children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [*children, *(each for child in children for each in _offspring(child))]
    except OSError:  # it has gone, or this is no Linux, where psutil has to look at every process there is
        with suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(pid).children(recursive=True)]
        return []
