"""The claims of a worker process: whoever asks while a statement is under way shares the next one.

What must stay true: the shared statement passes over rows that somebody has locked, so that no row holds up another's
claim; only a statement of its own, which waits for the lock, may tell somebody that there is nothing to claim; those
that wait never have all of the ledger's connections; and whoever asks is answered, whatever goes wrong.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from service.ledger import delivering

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from uuid import UUID

    from service.database.driver import Connection
    from service.ledger.delivering import Claim

_WAITING = 2
"""Connections that may wait for locked rows at a time."""


class Claims:
    """Takes rows for the runs of one event loop.

    Args:
        ledger: Lends a connection.
        lease: For how long a row is taken.
    """

    def __init__(self, ledger: Callable[[], AbstractAsyncContextManager[Connection]], lease: timedelta) -> None:
        self._ledger = ledger
        self._lease = lease
        self._asked: list[tuple[UUID, UUID, asyncio.Future[Claim | None]]] = []
        self._waiting = asyncio.Semaphore(_WAITING)
        self._sharing: asyncio.Task[None] | None = None

    async def claim(self, delivery_id: UUID, token: UUID) -> Claim | None:
        """See `delivering.claim`, whose errors this raises."""
        answer: asyncio.Future[Claim | None] = asyncio.get_running_loop().create_future()
        self._asked.append((delivery_id, token, answer))
        if self._sharing is None:
            self._sharing = asyncio.create_task(self._share())
        claim = await answer
        if claim is not None:
            return claim
        async with self.waiting() as connection:
            return await delivering.claim(connection, delivery_id, token, self._lease)

    async def claim_next(self, ended: Claim, token: UUID, consumers: Sequence[str]) -> Claim | None:
        """See `delivering.claim_next`, whose errors this raises."""
        async with self._ledger() as connection:
            return await delivering.claim_next(connection, ended, token, self._lease, consumers)

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[Connection]:
        """A connection for a statement that waits for locked rows."""
        async with self._waiting, self._ledger() as connection:
            yield connection

    async def _share(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, []
                await self._ask(asked)
        finally:
            self._sharing = None
            for _, _, answer in self._asked:  # only left when this task was cancelled
                answer.cancel()
            self._asked = []

    async def _ask(self, asked: list[tuple[UUID, UUID, asyncio.Future[Claim | None]]]) -> None:
        try:
            async with self._ledger() as connection:
                wanted = [(delivery_id, token) for delivery_id, token, _ in asked]
                claims = await delivering.claim_free(connection, wanted, self._lease)
        except Exception as error:  # noqa: BLE001  it is theirs who asked, and those who ask next are served
            for _, _, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
            return
        except BaseException:
            for _, _, answer in asked:
                answer.cancel()
            raise
        given = {(claim.id, claim.token): claim for claim in claims}
        for delivery_id, token, answer in asked:
            if not answer.done():
                answer.set_result(given.get((delivery_id, token)))
