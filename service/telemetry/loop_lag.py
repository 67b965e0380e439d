"""How long this process's event loop was held up by code that does not come back to it."""

from __future__ import annotations

import asyncio
from collections import deque

_EVERY = 0.1
_REMEMBERED = 10.0
"""Seconds."""


class LoopLag:
    """Asks the running loop to call back every 0.1 s, and notes how late that is. Make it on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._late: deque[tuple[float, float]] = deque(maxlen=int(_REMEMBERED / _EVERY))
        self._due = 0.0
        self._ask()

    def _ask(self) -> None:
        self._due = self._loop.time() + _EVERY
        self._timer = self._loop.call_at(self._due, self._called)

    def _called(self) -> None:
        now = self._loop.time()
        self._late.append((now, now - self._due))
        self._ask()

    def longest(self) -> float:
        """Seconds, of the last ten."""
        since = self._loop.time() - _REMEMBERED
        return max((late for at, late in self._late if at >= since), default=0.0)

    def stop(self) -> None:
        """Ask no more."""
        self._timer.cancel()
