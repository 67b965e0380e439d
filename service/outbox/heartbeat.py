"""Keeps the leases of this process's running deliveries alive.

What must stay true: it has a thread, an event loop and a connection of its own, because a consumer that blocks the
worker's loop must not lose its lease to another worker while it is still running; and it forgets a delivery the
moment its run is over.
"""

from __future__ import annotations

import asyncio
import threading
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
    """Extends every watched lease three times within its length, until `stop()`."""

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection[asyncpg.Record]]], lease: timedelta) -> None:
        super().__init__(name="outbox-heartbeat", daemon=True)
        self._connect = connect
        self._lease = lease
        self._watched: dict[UUID, tuple[UUID, timedelta]] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def watch(self, message_id: UUID, token: UUID, longest: timedelta) -> None:
        """Extend this claim's lease until `forget`, but never past `longest` after its start."""
        with self._lock:
            self._watched[message_id] = (token, longest)

    def forget(self, message_id: UUID, token: UUID) -> None:
        """The run is over. Another run of the same message in this process keeps its watch."""
        with self._lock:
            if self._watched.get(message_id, (None, None))[0] == token:
                del self._watched[message_id]

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join(timeout=5)

    def run(self) -> None:
        """Beat until stopped; a lost connection is replaced at the next beat."""
        asyncio.run(self._beat_until_stopped())

    async def _beat_until_stopped(self) -> None:
        connection: asyncpg.Connection[asyncpg.Record] | None = None
        interval = self._lease.total_seconds() / 3
        while not await asyncio.to_thread(self._stopped.wait, interval):
            with self._lock:
                leases = [(message_id, token, longest) for message_id, (token, longest) in self._watched.items()]
            if not leases:
                continue
            try:
                async with asyncio.timeout(interval):
                    if connection is None or connection.is_closed():
                        connection = await self._connect()
                    async with connection.transaction():
                        await statements.heartbeat(connection, leases, self._lease)
            except DRIVER_ERRORS as error:
                _log.warning("outbox.heartbeat_failed", error=type(error).__name__, leases=len(leases))
                if connection is not None:
                    connection.terminate()
                    connection = None
        if connection is not None:
            connection.terminate()
