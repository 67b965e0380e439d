"""This process in the ledger, so that whoever looks there sees who is alive and what they do."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from service.ledger import statistics
from service.ledger.statistics import ProcessIdentity, Vitals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from uuid import UUID

    from service.database.driver import Connection
    from service.telemetry.loop_lag import LoopLag

REPORT_EVERY = 10.0
"""Seconds."""


class Presence:
    """Reports on the process and on its event loop.

    Args:
        kind: relay or worker.
        version: What the running code is called.
        lag: Of its event loop.
        pool_timeouts: How often somebody in it waited in vain for a connection.
        queues: Those that a worker takes from.
        threads: Those in which a worker runs its actors.
    """

    def __init__(
        self,
        kind: str,
        version: str,
        lag: LoopLag,
        pool_timeouts: Callable[[], int] = lambda: 0,
        *,
        queues: Collection[str] = (),
        threads: int = 0,
    ) -> None:
        host, pid = socket.gethostname(), os.getpid()
        self._process = ProcessIdentity(uuid4(), kind, host, pid, sorted(queues), threads, version)
        self._began = time.monotonic()
        self._lag = lag
        self._pool_timeouts = pool_timeouts

    @property
    def id(self) -> UUID:
        """The process's row."""
        return self._process.id

    async def tell(self, connection: Connection, running: int = 0) -> None:
        """The process is alive, and runs so many deliveries."""
        up_for = timedelta(seconds=time.monotonic() - self._began)
        vitals = Vitals(running, self._lag.longest(), self._pool_timeouts())
        await statistics.report(connection, self._process, up_for, vitals)

    async def leave(self, connection: Connection) -> None:
        """The process ends."""
        await statistics.leave(connection, self._process)
