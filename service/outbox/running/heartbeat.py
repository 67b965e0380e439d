"""Keeps the leases of this process's running deliveries alive.

What must stay true: it has a thread, an event loop and a connection of its own, because a consumer that blocks the
worker's loop must not lose its lease to another worker while it is still running; it connects before there is a
lease to extend; and it forgets a delivery the moment its run is over. What ends a run that hangs is the time limit in
`runner.py`, and what ends a process that hangs, `service/worker/watchdog.py`.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from service.database.driver import DRIVER_ERRORS
from service.ledger import delivering
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta
    from uuid import UUID

    from service.database.driver import Connection

_log = get_logger(__name__)


class Heartbeat(threading.Thread):
    """Extends every watched lease three times within its length, until `stop()`.

    Args:
        connect: Makes the connection, and another when it was lost.
        lease: What is left of a lease after each beat.
        transactions: Whether a statement needs one, as behind a pooler.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[Connection]], lease: timedelta, *, transactions: bool = False
    ) -> None:
        super().__init__(name="outbox-heartbeat", daemon=True)
        self._connect = connect
        self._transactions = transactions
        self._lease = lease
        self._interval = lease.total_seconds() / 3
        self._connection: Connection | None = None
        self._watched: dict[UUID, tuple[UUID, timedelta]] = {}
        self._lock = threading.Lock()
        self._stopped = asyncio.Event()

    def watch(self, delivery_id: UUID, token: UUID, longest: timedelta) -> None:
        """Extend this claim's lease until `forget`, but never past `longest` after its start."""
        with self._lock:
            self._watched[delivery_id] = (token, longest)

    def forget(self, delivery_id: UUID, token: UUID) -> None:
        """The run is over. Another run of the same delivery in this process keeps its watch."""
        with self._lock:
            if self._watched.get(delivery_id, (None, None))[0] == token:
                del self._watched[delivery_id]

    @property
    def is_connected(self) -> bool:
        """Whether it has a connection to PostgreSQL; for any thread."""
        connection = self._connection
        return connection is not None and not connection.is_closed()

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        super().start()

    def stop(self) -> None:
        """End the thread, whatever it waits for."""
        with suppress(RuntimeError):  # it has ended, and its loop is closed
            self._loop.call_soon_threadsafe(self._stopped.set)
        self.join(timeout=5)

    def run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._until_stopped())

    async def _until_stopped(self) -> None:
        beating, stopped = (asyncio.ensure_future(each) for each in (self._beat_for_ever(), self._stopped.wait()))
        await asyncio.wait({beating, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if self._connection is not None:
            self._connection.terminate()
        if beating.done():
            await beating  # it only ends by an error

    async def _beat_for_ever(self) -> None:
        # What hangs is given up, and tried again on another connection, while a third of the lease is left.
        pause = self._interval / 10
        while True:
            try:
                await self._beat(self._interval - pause)
            except DRIVER_ERRORS as error:
                if self._watched:
                    _log.warning("outbox.heartbeat_failed", error=type(error).__name__, leases=len(self._watched))
                await asyncio.sleep(pause)
            else:
                await asyncio.sleep(self._interval)

    async def _beat(self, patience: float) -> None:
        """Extend the leases, for which a connection is made that is terminated after `patience` seconds.

        It is made ready also when there is nothing to extend yet: while a run calculates, each wait for an answer is
        followed by one for the interpreter's lock, and connecting is a dozen of them.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        connection = self._connection
        unused = connection is None or connection.is_closed()
        if connection is None or unused:
            async with asyncio.timeout_at(deadline):
                connection = self._connection = await self._connect()
        with self._lock:
            leases = [(delivery_id, token, longest) for delivery_id, (token, longest) in self._watched.items()]
        if not leases and not unused:
            return
        # Not `asyncio.timeout`: the ROLLBACK would wait for the cancelled statement's answer, for longer than a lease.
        silent = loop.call_at(deadline, connection.terminate)
        try:
            async with connection.transaction() if self._transactions else nullcontext():
                await delivering.heartbeat(connection, leases, self._lease)
        except Exception as error:
            ended = connection.is_closed()
            connection.terminate()
            if ended and not isinstance(error, DRIVER_ERRORS):
                raise ConnectionError("the connection ended between two steps of the driver") from error
            raise
        finally:
            silent.cancel()
