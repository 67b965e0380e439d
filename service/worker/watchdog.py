"""Sees that a worker process is stuck for good or has lost its main process, so that its supervisor starts another.

A time limit is an exception, and neither a coroutine that blocks the event loop nor a `def` consumer that waits in C
code comes back to Python to receive it. The process would live on, run nothing and swallow messages, and so would in
turn each worker that is handed the delivery. So this thread dies, and `process.py` ends the process, as it does when
any thread dies. Attempts are counted as for any lost worker.

Where Dramatiq's main process is killed, nobody stops its children or would start them again: they would go on beside
those of the next one, with the code of then. So each stops as if it had been told to.

What must stay true: it counts its own looks and not the clock, so that a machine that stood still is not taken for a
stuck process; nor is an outage: a run is over before its outcome is written down, which waits for PostgreSQL.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.errors import ServiceError
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

_log = get_logger(__name__)

_INTERVAL = 1.0

_ORPHANED_FOR = 3
"""Looks after which an orphan is told to stop: the signal may have been its main process's last deed, and a second one
ends a worker without grace."""


class StuckError(ServiceError):
    """Something in this process does not come back."""


class _Watched:
    """Something in the calling thread that must end, or answer, before it was looked at for `limit` seconds."""

    def __init__(self, what: str, limit: float) -> None:
        self._what = what
        self._limit = limit
        self._thread = threading.get_ident()
        self._looks = 0

    def look(self) -> None:
        self._looks += 1
        seconds = self._looks * _INTERVAL
        if seconds > self._limit:
            raise StuckError(f"{self._what} has not come back for {seconds:g} s, and stands at {self._place()}")

    def _place(self) -> str:
        frame = sys._current_frames().get(self._thread)  # noqa: SLF001  documented, for just this
        return ", ".join(f"{each.filename}:{each.lineno}" for each in traceback.extract_stack(frame)[-3:])

    def answer(self) -> None:
        self._looks = 0


def orphaned() -> bool:
    """Whether the process that started this one with `multiprocessing`, as Dramatiq does, is gone."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    # A fork leaves its brothers the end of the pipe that shows it; of a fork server the main process is no parent.
    forked = multiprocessing.get_start_method() != "forkserver"
    return not parent.is_alive() or (forked and os.getppid() != parent.pid)


class Watchdog(threading.Thread):
    """Dies of a `StuckError`. Make it on the event loop.

    Args:
        loop: That loop, which all coroutines share.
        limit: Seconds for which the loop may do nothing else but one step of one of them.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: float) -> None:
        super().__init__(name="outbox-watchdog", daemon=True)
        self._loop = loop
        self._watched_loop = _Watched("the event loop", limit)
        self._runs: dict[int, _Watched] = {}
        self._orphaned_for = 0
        self._stopping = False
        self._stopped = threading.Event()

    @contextmanager
    def running(self, what: str, limit: float) -> Iterator[None]:
        """Around what the calling thread runs, for at most `limit` seconds."""
        self._runs[threading.get_ident()] = _Watched(what, limit)
        try:
            yield
        finally:
            self.ended()

    def ended(self) -> None:
        """The calling thread's run is over. A time limit may have been raised just where `running` would say so."""
        self._runs.pop(threading.get_ident(), None)

    def stopping(self) -> None:
        """The worker has been told to stop."""
        self._stopping = True

    def stop(self) -> None:
        """End the thread, before the loop is closed."""
        self._stopped.set()
        self.join(timeout=5)

    def run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            self._loop.call_soon_threadsafe(self._watched_loop.answer)
            for each in (self._watched_loop, *self._runs.copy().values()):
                each.look()
            self._look_at_parent()

    def _look_at_parent(self) -> None:
        if self._stopping or not orphaned():
            return
        self._orphaned_for += 1
        if self._orphaned_for == _ORPHANED_FOR:
            _log.critical("worker.orphaned")
            os.kill(os.getpid(), signal.SIGTERM)
