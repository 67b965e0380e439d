"""How long this process's event loop is held up by code that does not come back to it, and by which.

A thread of its own asks the loop, so it sees what happens while nothing on the loop can. What must stay true: it costs
the same few microseconds ten times a second whatever runs, and looks at what runs only when the loop is late; it never
raises, for it may not end a process that works; and a process that stood still as a whole blames nobody.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import FrameType

    from service.telemetry.probe import SignOfLife

    Task = asyncio.Task[Any]

_log = get_logger(__name__)

_EVERY = 0.1
_REMEMBERED = 10.0
_TOUCH_EVERY = 1.0
_PUNCTUAL = 0.5
"""Seconds; later than the last this thread blames nobody, since it was itself held up."""

_FRAMES = 8
"""Places in the code that a line names, the innermost first."""


def _nothing(_task: Task) -> Mapping[str, str]:
    return {}


class LoopLag(threading.Thread):
    """Asks the running loop to answer every 0.1 s, and notes how late that is. Make it on the loop.

    Args:
        told_after: Seconds for which the loop may be held up before a line of the log says by what.
        running: What a task of the loop runs, for that line; asked from this thread.
        sign: Touched after the loop has answered.
        ready: Whether the process is connected to what it works with; asked from this thread.
    """

    def __init__(
        self,
        told_after: float,
        running: Callable[[Task], Mapping[str, str]] = _nothing,
        *,
        sign: SignOfLife | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__(name="loop-lag", daemon=True)
        self._loop = asyncio.get_running_loop()
        self._of_loop = threading.get_ident()
        self._told_after = told_after
        self._running = running
        self._sign = sign
        self._ready = ready
        self._touch_at = 0.0
        self._touch_failed = False
        self._late: deque[tuple[float, float]] = deque(maxlen=int(_REMEMBERED / _EVERY))
        self._answered = threading.Event()
        self._stopped = threading.Event()

    def longest(self) -> float:
        """Seconds, of the last ten."""
        since = time.monotonic() - _REMEMBERED
        return max((late for at, late in self._late.copy() if at >= since), default=0.0)

    def stop(self) -> None:
        """Ask no more. The thread ends by itself: whoever stops it may be on the loop that it waits for."""
        self._stopped.set()
        self._answered.set()

    def run(self) -> None:
        while not self._stopped.wait(_EVERY):
            self._answered.clear()
            try:
                self._loop.call_soon_threadsafe(self._answer, time.monotonic())
            except RuntimeError:  # the loop is closed
                break
            self._wait()
            self._touch()
        if self._sign is not None:
            self._sign.remove()

    def _answer(self, asked: float) -> None:
        now = time.monotonic()
        self._late.append((now, now - asked))
        self._answered.set()

    def _wait(self) -> None:
        told = False
        while True:
            began = time.monotonic()
            if self._answered.wait(self._told_after) or self._loop.is_closed():
                return
            if not told and time.monotonic() - began < self._told_after + _PUNCTUAL:
                told = self._tell()

    def _tell(self) -> bool:
        """Whether it was told by what the loop is held up; it may have come back just now."""
        try:
            task = asyncio.current_task(self._loop)
            held_by = dict(self._running(task)) if task is not None else {}
            places = _places(sys._current_frames().get(self._of_loop))  # noqa: SLF001  documented, for just this
        except Exception as error:  # noqa: BLE001  it is read while it changes
            held_by, places = {"error": type(error).__name__}, ""
        if self._answered.is_set():
            return False
        _log.warning("loop.held", after=self._told_after, at=places, **held_by)
        return True

    def _touch(self) -> None:
        if self._sign is None or self._stopped.is_set() or time.monotonic() < self._touch_at:
            return
        self._touch_at = time.monotonic() + _TOUCH_EVERY
        try:
            self._sign.touch(ready=self._ready())
        except OSError as error:
            if not self._touch_failed:
                _log.error("probe.not_written", error=str(error))
            self._touch_failed = True
        else:
            self._touch_failed = False


def _places(frame: FrameType | None) -> str:
    """Where the code stands: module and line of each caller, without values."""
    places: list[str] = []
    while frame is not None and len(places) < _FRAMES:
        places.append(f"{frame.f_globals.get('__name__')}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(places)
