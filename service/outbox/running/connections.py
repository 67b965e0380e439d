"""Lends the engine's connections to runs, of which there may be more than connections.

What must stay true: they are lent in the order in which they are asked for; the wait counts against no time limit, and
the lease is kept meanwhile; and a run that has one does not stand in line for a second, where it might wait for itself.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from service.database.lent_connection import lend_connection
from service.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from service.database.driver import PreparedBegin
    from service.database.lent_connection import LentConnection
    from service.database.sessions import SessionFactory
    from service.outbox.running.clock import Clock


class Connections:
    """Those of one engine, on one event loop.

    Args:
        engine: Whose they are.
        sessions: Opens a session.
        count: How many of them the engine has connections for at a time.

    Attributes:
        count: As given.
        timeouts: How often a run waited in vain.
        when_enough: Called when no run waits for one any more.
    """

    def __init__(self, engine: AsyncEngine, sessions: SessionFactory, count: int) -> None:
        self.engine = engine
        self.sessions = sessions
        self.count = count
        self.timeouts = 0
        self.when_enough: Callable[[], None] = lambda: None
        self._free = asyncio.Semaphore(count)
        self._waiting = 0

    @property
    def short(self) -> bool:
        """Whether a run waits for one."""
        return self._waiting > 0

    async def take(self, clock: Clock) -> None:
        """Stand in line for one, to be given back by `give_back`.

        Raises:
            DatabaseUnavailableError: when none is free for as long as the run may take.
        """
        if not self._free.locked():
            await self._free.acquire()
            return
        self._waiting += 1
        try:
            with clock.standing_still():
                async with asyncio.timeout(clock.limit):
                    await self._free.acquire()
        except TimeoutError:
            self.timeouts += 1
            raise DatabaseUnavailableError(f"no connection was free for {clock.limit:g} s") from None
        finally:
            self._waiting -= 1
            if self._waiting == 0:
                self.when_enough()

    def give_back(self) -> None:
        self._free.release()


class Lender:
    """Lends one run what it asks for: `async with lender(mark=...) as session`."""

    def __init__(self, connections: Connections, clock: Clock) -> None:
        self._connections = connections
        self._clock = clock
        self._lent = 0

    @asynccontextmanager
    async def __call__(self, **options: Any) -> AsyncIterator[AsyncSession]:
        """A session, made with these options."""
        async with self._in_line(), self._connections.sessions(**options) as session:
            yield session

    @asynccontextmanager
    async def connection(self, mark: str, first: Callable[[PreparedBegin], str]) -> AsyncIterator[LentConnection]:
        """A connection without a session; see `lend_connection`."""
        async with self._in_line(), lend_connection(self._connections.engine, mark, first) as lent:
            yield lent

    @asynccontextmanager
    async def _in_line(self) -> AsyncIterator[None]:
        first = self._lent == 0
        if first:
            await self._connections.take(self._clock)
        self._lent += 1
        try:
            yield
        finally:
            self._lent -= 1
            if first:
                self._connections.give_back()
