"""Counts what this process runs, and adds it to the ledger now and then.

What must stay true: a delivery never waits for it, costs no statement more for it, and does not fail with it. What the
ledger does not take is kept for the next time; a process that is killed loses what it counted since the last one, and
where the answer to a commit is lost, that much is counted twice.

It borrows a connection from the ledger's pool, for a moment. The heartbeat's would be one fewer to share, but leases
hang on it, and here somebody else's lock may have to be waited for.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from service.ledger import statistics
from service.ledger.presence import REPORT_EVERY
from service.ledger.statistics import Key, Runs
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from service.database.driver import Connection
    from service.ledger.delivering import Claim
    from service.ledger.presence import Presence

_log = get_logger(__name__)

_LAST = 2.0
"""Seconds that a stopping process gives PostgreSQL to take what is left."""

_KEYS = 1_000
"""What is counted apart at most: names of consumers come with rows, also those that nobody here knows."""


class Recorder:
    """Counts on one event loop.

    Args:
        ledger: Lends a connection.
    """

    def __init__(self, ledger: Callable[[], AbstractAsyncContextManager[Connection]]) -> None:
        self._ledger = ledger
        self._counted: dict[Key, Runs] = {}
        self._reporting: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()
        self._failing = False
        self._full = False

    def count(self, claim: Claim, outcome: str) -> None:
        """A run is over, and what became of it is written down."""
        key = Key(claim.queue, claim.consumer, outcome)
        counts = self._counted.get(key)
        if counts is None:
            if len(self._counted) >= _KEYS:
                if not self._full:
                    _log.warning("outbox.statistics_full", consumers=_KEYS)
                self._full = True
                return
            counts = self._counted[key] = Runs()
        ran = time.perf_counter() - claim.began
        counts.count += 1
        counts.run.add(ran)
        if claim.attempts == 1:
            counts.start.add(claim.waited)
        if outcome == "completed":
            counts.effect.add(claim.waited + ran)

    def start(self, presence: Presence, running: Callable[[], int]) -> None:
        """Report from now on. Without it what is counted is never written, as in tests.

        Args:
            presence: This process in the ledger.
            running: How many deliveries it runs just now.
        """
        self._reporting = asyncio.create_task(self._report_regularly(presence, running))

    async def stop(self) -> None:
        """Report a last time, if PostgreSQL takes it at once."""
        self._ending.set()
        if self._reporting is not None:
            _, late = await asyncio.wait((self._reporting,), timeout=_LAST)
            if late or self._counted:
                _log.warning("outbox.statistics_lost")
            self._reporting.cancel()

    async def _report_regularly(self, presence: Presence, running: Callable[[], int]) -> None:
        while not self._ending.is_set():
            await self._report(lambda connection: presence.tell(connection, running()))
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_EVERY):
                    await self._ending.wait()
        await self._report(presence.leave)

    async def _report(self, about: Callable[[Connection], Awaitable[None]]) -> None:
        counted, self._counted = self._counted, {}
        try:
            async with self._ledger() as connection:
                await about(connection)
                await statistics.add(connection, counted)
        except Exception as error:  # noqa: BLE001  whatever it is, deliveries go on
            if not self._failing:
                _log.warning("outbox.statistics_wait", error=brief(error))
            self._failing = True
            for key, counts in counted.items():
                self._counted.setdefault(key, Runs()).merge(counts)
        else:
            self._failing = False
