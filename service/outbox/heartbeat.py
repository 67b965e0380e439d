"""Keeps the leases of this process's running deliveries alive.

What must stay true: it has a thread, an event loop and a connection of its own, because a consumer that blocks the
worker's loop must not lose its lease to another worker while it is still running; that connection is there before it
is needed; and it forgets a delivery the moment its run is over.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from service.driver import DRIVER_ERRORS
from service.outbox import statements
from service.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta
    from uuid import UUID

    import asyncpg

__all__ = ["Heartbeat"]

_log = get_logger(__name__)


class Heartbeat(threading.Thread):
    """Extends every watched lease three times within its length, until `stop()`.

    Args:
        connect: Makes the connection, and another when it was lost.
        lease: What is left of a lease after each beat.
        transactions: Whether a statement needs one, as behind a pooler.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[asyncpg.Connection[asyncpg.Record]]],
        lease: timedelta,
        *,
        transactions: bool = False,
    ) -> None:
        super().__init__(name="outbox-heartbeat", daemon=True)
        self._connect = connect
        self._transactions = transactions
        self._lease = lease
        self._interval = lease.total_seconds() / 3
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._watched: dict[UUID, tuple[UUID, timedelta]] = {}
        self._lock = threading.Lock()
        self._stopped = asyncio.Event()

    def watch(self, message_id: UUID, token: UUID, longest: timedelta) -> None:
        """Extend this claim's lease until `forget`, but never past `longest` after its start."""
        with self._lock:
            self._watched[message_id] = (token, longest)

    def forget(self, message_id: UUID, token: UUID) -> None:
        """The run is over. Another run of the same message in this process keeps its watch."""
        with self._lock:
            if self._watched.get(message_id, (None, None))[0] == token:
                del self._watched[message_id]

    def start(self) -> None:
        """Start the thread."""
        self._loop = asyncio.new_event_loop()
        super().start()

    def stop(self) -> None:
        """End the thread."""
        with suppress(RuntimeError):  # it has ended, and its loop is closed
            self._loop.call_soon_threadsafe(self._stopped.set)
        self.join(timeout=5)

    def run(self) -> None:
        """Beat until stopped; a lost connection is replaced at the next beat."""
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._beat_until_stopped())

    async def _beat_until_stopped(self) -> None:
        # A connection that hangs is found out, and the next one tried, while a third of the lease is left.
        pause = self._interval / 10
        patience = self._interval - pause
        while not self._stopped.is_set():
            with self._lock:
                leases = [(message_id, token, longest) for message_id, (token, longest) in self._watched.items()]
            next_beat = self._interval
            if leases or self._connection is None or self._connection.is_closed():
                try:
                    await self._beat(leases, patience)
                except DRIVER_ERRORS as error:
                    if leases:
                        _log.warning("outbox.heartbeat_failed", error=type(error).__name__, leases=len(leases))
                    next_beat = pause
            # Not in a thread of its own: none can be had any more from an interpreter that is about to exit.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), next_beat)
        if self._connection is not None:
            self._connection.terminate()

    async def _beat(self, leases: list[tuple[UUID, UUID, timedelta]], patience: float) -> None:
        """One beat, on a connection that is terminated if it takes longer than `patience` seconds.

        It also makes ready a connection that has nothing to extend yet: while a run calculates, each wait for an answer
        is followed by one for the interpreter's lock, and connecting is a dozen of them.
        """
        if self._connection is None or self._connection.is_closed():
            self._connection = None
            async with asyncio.timeout(patience):
                self._connection = await self._connect()
        connection = self._connection
        # Not `asyncio.timeout`: the ROLLBACK would wait for the cancelled statement's answer, for longer than a lease.
        silent = asyncio.get_running_loop().call_later(patience, connection.terminate)
        try:
            async with connection.transaction() if self._transactions else nullcontext():
                await statements.heartbeat(connection, leases, self._lease)
        except Exception as error:
            terminated = connection.is_closed()
            connection.terminate()
            if terminated:  # asyncpg then raises whatever it came across
                raise ConnectionError("PostgreSQL did not answer in time") from error
            raise
        finally:
            silent.cancel()
