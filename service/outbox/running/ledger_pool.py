"""A worker's connections for the ledger's own statements: claims, and outcomes outside the effect's transaction.

What must stay true: no statement holds one of the few connections for as long as a lease; and a connection that is of
no use any more is given up, with the others that lead to the same place.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from service.database.driver import bound_waits, open_connection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.database.driver import Connection
    from service.settings import Settings

CONNECTIONS = 4
"""At most, of one worker process."""


class LedgerPool:
    """Lends connections on the event loop that it was opened on: `async with pool() as connection`."""

    def __init__(self, settings: Settings) -> None:
        # The server's limit comes first: what the client gives up may go on behind its back.
        longest = max(settings.outbox.lease / 3, 2)
        prepare = None if settings.database.pooler else partial(bound_waits, statement_timeout=f"{longest * 750:.0f}ms")

        async def connect(dsn: str | None = None, **arguments: Any) -> Connection:  # noqa: ARG001  asyncpg gives it
            return await open_connection(settings.database, "outbox-worker-ledger", **arguments)

        self._pool = asyncpg.create_pool(
            min_size=0,
            max_size=CONNECTIONS,
            connect=connect,
            init=prepare,
            reset=_keep,
            command_timeout=longest,
        )
        # A pooler in transaction mode may give a statement's second half another server outside a transaction.
        self._transactions = settings.database.pooler

    async def open(self) -> None:
        """Be ready. PostgreSQL need not be up yet."""
        await self._pool

    async def close(self) -> None:
        await self._pool.close()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Connection]:
        """A connection, once one is free.

        Raises:
            TimeoutError: when none is within 10 s.
        """
        async with self._pool.acquire(timeout=10) as lent:
            connection = cast("Connection", lent)  # a stand-in that does all that one does
            try:
                if self._transactions:
                    async with connection.transaction():
                        yield connection
                else:
                    yield connection
            except (TimeoutError, asyncpg.ReadOnlySQLTransactionError):
                # It has gone silent, or leads to a server that only reads.
                connection.terminate()
                await self._pool.expire_connections()
                raise


async def _keep(_connection: Connection) -> None:
    """Nothing of the session is ever changed, so there is nothing to reset."""
