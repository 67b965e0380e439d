"""API, workers and relay as production runs them, for tests that kill or replace them.

Each process leads a group of its own, and whatever still runs at the end is ended by its group's id.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

from service.dev.places import ROOT
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Processes", "Started"]


class Started:
    """A process and its log."""

    def __init__(self, environment: Mapping[str, str], log: Path, *command: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )

    @property
    def url(self) -> str:
        """Where an API listens."""
        found = re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())
        assert found is not None, self.log
        return found[0]

    def children(self) -> list[psutil.Process]:
        """The processes below it, and Python's own helpers beside them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def says(self, text: str) -> bool:
        """Whether the log has it."""
        return text in self.log.read_text()

    async def kill(self) -> None:
        """SIGKILL it with its children, as a machine that vanishes does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await asyncio.to_thread(self.process.wait)

    async def stop(self) -> int:
        """SIGTERM to the leader, and its exit status; by force if it takes too long. Orphans are left to be found."""
        self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, 60)
        except subprocess.TimeoutExpired:
            await self.kill()
            raise


class Processes:
    """Starts processes with one environment, each with a log of its own.

    Args:
        environment: Their settings; read at every start, so that a fixture may still change it.
        folder: For the logs.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._environment = environment
        self._folder = folder
        self._started: list[Started] = []

    async def api(self, application: str, *, port: int = 0, **settings: str) -> Started:
        """An API; its `url` is known once it listens."""
        bounds = ("--http", "service.http.protocol:BoundedProtocol")
        command = ("uvicorn", application, "--factory", *bounds, "--host", "127.0.0.1", "--port", str(port))
        return await self._start("Uvicorn running on", settings, *command)

    async def worker(self, broker: str, *arguments: str, **settings: str) -> Started:
        """A Dramatiq master with one child, unless the arguments say otherwise."""
        arguments = arguments or ("-p", "1", "-t", "4")
        return await self._start("ready for action", settings, "dramatiq", broker, *arguments)

    async def relay(self, **settings: str) -> Started:
        """A relay."""
        return await self._start("relay.started", settings, "relay", "relay")

    async def _start(self, ready: str, settings: dict[str, str], *command: str) -> Started:
        log = self._folder / f"process-{len(self._started)}.log"
        started = Started({**self._environment, **settings}, log, *command)
        self._started.append(started)
        await until(lambda: started.says(ready) or started.process.poll() is not None, what=ready)
        assert started.process.poll() is None, log.read_text()
        return started

    async def stop(self) -> None:
        """End what still runs."""
        running = [each for each in reversed(self._started) if each.process.poll() is None]
        await asyncio.gather(*(each.stop() for each in running))
        for each in self._started:
            await each.kill()
