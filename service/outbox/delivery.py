"""One delivery in the worker: claim the row, run the consumer, and tick the row off in the consumer's own transaction.

The broker's message is a doorbell that carries the row's id; it may ring twice, late, or for a row that is done. What
must stay true:

- A consumer's writes and the row's completion commit together or not at all. `begin()` ends with the complete
  statement; if the row is not this claim's any more, the effect is rolled back.
- Whatever goes wrong, the row stays in the ledger with a time at which it comes due again. So every path may end by
  acknowledging the broker's message, and none raises into Dramatiq, whose own retry could be lost.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession

from service.errors import DatabaseUnavailableError, DeliveryError
from service.outbox import statements
from service.outbox.publish import READ_ONLY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

    from service.database import SessionFactory
    from service.outbox.statements import Claim, Connection

__all__ = ["Delivery", "LeaseLostError"]

_START = """
SELECT pg_current_xact_id()::text, current_setting('transaction_isolation'),
       set_config(CASE WHEN current_setting('server_version_num')::int >= 170000
                       THEN 'transaction_timeout' ELSE 'statement_timeout' END, $1, true),
       set_config('idle_in_transaction_session_timeout', $1, true)
"""


class LeaseLostError(Exception):
    """The row is another worker's by now, or done; this run's effect was rolled back."""


class Delivery:
    """What a consumer knows of its delivery, and its way to the database.

    Attributes:
        idempotency_key: The same for every attempt and replay; pass it to whatever the consumer calls outside.
        event_id: Shared by all deliveries of the event.
        consumer: Name under which the row is stored.
        attempt: From 1; a fresh count after a replay.
        correlation_id: Of the request that caused the event.
    """

    def __init__(self, claim: Claim, sessions: SessionFactory, *, is_async: bool, timeout_ms: int) -> None:
        self.idempotency_key = str(claim.id)
        self.event_id: UUID = claim.event_id
        self.consumer = claim.consumer
        self.attempt = claim.attempts
        self.correlation_id = claim.headers.get("correlation_id")
        self.begun = False
        self.completed = False
        self.lost = False
        self._claim = claim
        self._sessions = sessions
        self._is_async = is_async
        self._timeout_ms = timeout_ms

    def begin(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A session in a transaction of its own; its commit, at the end of the block, also completes the delivery.

        Raises:
            DeliveryError: for a second `begin()`, in a `def` consumer, or when the consumer ended the transaction
                itself. The delivery then goes to the dead letters: running it again would repeat half an effect.
        """
        if not self._is_async:
            raise DeliveryError("a `def` consumer cannot call begin(): make it `async def`, or return to complete it")
        if self.begun:
            raise DeliveryError("begin() can be entered once: put everything that must happen together into one block")
        self.begun = True
        return self._begin()

    def read(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A read-only session, for what must be known before an effect outside the database."""
        if not self._is_async:
            raise DeliveryError("a `def` consumer has no session: make it `async def`, or pass it what it needs")
        return self._read()

    @asynccontextmanager
    async def _begin(self) -> AsyncIterator[AsyncSession]:
        async with self._sessions() as session:
            xid = await self._start(session)
            yield session
            await session.flush()
            await self._complete(session, xid)
            await AsyncSession.commit(session)
        self.completed = True

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncSession]:
        async with self._sessions(info={READ_ONLY: True}) as session:
            try:
                await session.connection(execution_options={"postgresql_readonly": True})
            except OSError as error:
                raise DatabaseUnavailableError("PostgreSQL cannot be reached") from error
            yield session
            if session.new or session.dirty or session.deleted:
                raise DeliveryError("delivery.read() is never committed: write inside `async with delivery.begin()`")

    async def _start(self, session: AsyncSession) -> str:
        try:
            connection = await session.connection()
            row: Sequence[str] = (await connection.exec_driver_sql(_START, (str(self._timeout_ms),))).one()
        except OSError as error:
            raise DatabaseUnavailableError("PostgreSQL cannot be reached") from error
        if not (await _driver_connection(session)).is_in_transaction():
            raise DeliveryError("a delivery needs a transaction: do not set AUTOCOMMIT on the engine")
        xid, isolation = row[0], row[1]
        if isolation != "read committed":
            # The heartbeat changes the row meanwhile; above READ COMMITTED the complete would fail for ever.
            raise DeliveryError(f"a delivery runs at READ COMMITTED, not {isolation.upper()}")
        return xid

    async def _complete(self, session: AsyncSession, xid: str) -> None:
        connection = await _driver_connection(session)
        unbroken, completed = await statements.complete_in_transaction(connection, self._claim, xid)
        if not unbroken:
            raise DeliveryError("the transaction of begin() was committed or rolled back inside its block")
        if not completed:
            self.lost = True
            raise LeaseLostError


async def _driver_connection(session: AsyncSession) -> Connection:
    raw = await (await session.connection()).get_raw_connection()
    connection: Connection | None = raw.driver_connection
    assert connection is not None
    return connection
