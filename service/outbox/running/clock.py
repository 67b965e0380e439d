"""The time limit of a run on the event loop.

What must stay true: it is the consumer's own time that counts, so the clock stands still while the consumer waits for
what it shares with other runs; and whoever waits for a run is told when it goes on although it was cancelled.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Clock:
    """Cancels the task that starts it when its time is over.

    Args:
        limit: Seconds that the run may take.
        grace: Seconds after that in which it may come to its end.
        extend: Called with the seconds by which it may end later, because the clock stands still.

    Attributes:
        limit: As given.
        expired: Whether the limit was reached.
    """

    def __init__(self, limit: float, grace: float, extend: Callable[[float], None]) -> None:
        self.limit = limit
        self.expired = False
        self._grace = grace
        self._extend = extend
        self._task: asyncio.Task[object] | None = None
        self._waits = 0
        self._stood_still = 0.0

    def start(self, abandon: Callable[[], None]) -> None:
        """The run begins, in the current task; `abandon` is called when it has not ended within the grace."""
        self._abandon = abandon
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self.limit, self._expire)

    def stop(self) -> None:
        """The run is over."""
        assert self._task is not None
        if self.expired:
            self._task.uncancel()
        self._task = None
        self._timer.cancel()

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Around a wait, as long as `limit` at most, that is not the run's doing."""
        if self._waits == 0:
            self._stopped_at = self._loop.time()
            self._left = self._timer.when() - self._stopped_at
            if not self.expired:
                self._timer.cancel()
        self._waits += 1
        if self._task is not None:
            self._extend(self._stood_still + self.limit)
        try:
            yield
        finally:
            self._waits -= 1
            if self._waits == 0 and self._task is not None and not self.expired:
                self._stood_still += self._loop.time() - self._stopped_at
                self._timer = self._loop.call_later(self._left, self._expire)
                self._extend(self._stood_still)

    def _expire(self) -> None:
        assert self._task is not None
        self.expired = True
        self._timer = self._loop.call_later(self._grace, self._abandon)
        self._task.cancel()
