"""Tells the ledger now and then that this relay is there, on the session that it works with anyway.

What must stay true: whatever PostgreSQL says to that, the relay goes on handing over.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from service.ledger.presence import REPORT_EVERY, Presence
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from service.database.driver import Connection
    from service.telemetry.loop_lag import LoopLag

_log = get_logger(__name__)


class Reporting:
    """A relay that sleeps reports when it wakes up."""

    def __init__(self, version: str, lag: LoopLag) -> None:
        self._presence = Presence("relay", version, lag)
        self._due_at = 0.0
        self._failing = False

    @asynccontextmanager
    async def beside(self, connection: Connection) -> AsyncIterator[None]:
        """Around a statement of the relay: what is to be told shares its transaction, and costs none of its own."""
        if time.monotonic() < self._due_at:
            yield
            return
        self._due_at = time.monotonic() + REPORT_EVERY
        async with connection.transaction():
            yield
            await self._try(self._presence.tell(connection))

    async def leave(self, connection: Connection) -> None:
        """The relay ends."""
        await self._try(self._presence.leave(connection))

    async def _try(self, telling: Awaitable[None]) -> None:
        try:
            await telling
        except asyncpg.PostgresError as error:
            if not self._failing:
                _log.warning("relay.not_reported", error=brief(error))
            self._failing = True
        else:
            self._failing = False
