"""A delivery as its consumer has it: what it is told, and the session whose commit also completes the delivery.

What must stay true: a consumer's writes and the delivery's completion commit together or not at all. `begin()` ends
with the complete statement; if the delivery is not this claim's any more, the effect is rolled back.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sqlalchemy import text

from service.database.driver import PreparedBegin, has_transaction_timeout
from service.database.sessions import OneTransaction, commit
from service.errors import DatabaseUnavailableError, DeliveryError, ServiceError
from service.ledger import delivering
from service.outbox.publish import READ_ONLY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncSession

    from service.database.driver import Connection
    from service.database.lent_connection import LentConnection
    from service.ledger.delivering import Claim

# A query and not SET: it takes the snapshot, after which PostgreSQL refuses another isolation level. The mark of the
# session's transaction is the claim's token here, so that the complete statement can ask for it.
_START = """
SELECT set_config('outbox.transaction', '{token}', true), set_config('{timeout}', '{milliseconds}', true),
       set_config('idle_in_transaction_session_timeout', '{milliseconds}', true),
       current_setting('transaction_isolation') AS isolation
"""


class LeaseLostError(ServiceError):
    """The delivery is another worker's by now, or done; this run's effect was rolled back."""


@dataclass(slots=True)
class Progress:
    """How far a run has come in the database: its `Delivery` notes it, and the runner judges the run by it."""

    begun: bool = False
    """`begin()` was called."""
    completed: bool = False
    """The effect and the delivery's completion are committed."""
    lost: bool = False
    """The delivery is somebody else's; the effect was rolled back."""
    may_claim_next: Callable[[], bool] = lambda: False
    """Asked at the completion: whether the worker itself will take what is next in the lane."""
    claims_next: bool = False
    """What was answered."""
    unreached: bool = False
    """The session is not there yet: PostgreSQL has executed nothing of the run's."""


class Delivery:
    """What a consumer knows of its delivery, and its way to the database.

    Attributes:
        idempotency_key: The delivery's id, for whatever the consumer calls outside. It stays the same in a replay.
        event_id: Shared by all deliveries of the event.
        consumer: Name under which the row is stored.
        attempt: From 1; a fresh count after a replay.
        last_attempt: Whether a failure of this attempt makes it a dead letter, for no retry is left.
        published_at: When the event was written, by the database's clock; a replay does not change it.
        dead_letter: For an `on_dead`, the number of the dead letter; else `None`.
        correlation_id: Of the request that caused the event.
    """

    def __init__(
        self,
        claim: Claim,
        sessions: Callable[..., AbstractAsyncContextManager[AsyncSession]],
        connections: Callable[[str, Callable[[Connection], str]], AbstractAsyncContextManager[LentConnection]],
        progress: Progress,
        *,
        is_async: bool,
        timeout_ms: int,
        last_attempt: bool,
    ) -> None:
        self.idempotency_key = str(claim.id)
        self.event_id: UUID = claim.event_id
        self.consumer = claim.consumer
        self.attempt = claim.attempts
        self.last_attempt = last_attempt
        self.published_at = claim.published_at
        self.dead_letter = claim.dead_letter
        self.correlation_id = claim.headers.get("correlation_id")
        self._claim = claim
        self._sessions = sessions
        self._connections = connections
        self._progress = progress
        self._is_async = is_async
        self._timeout_ms = timeout_ms

    def begin(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A session in a transaction of its own; its commit, at the end of the block, also completes the delivery.

        Raises:
            DeliveryError: for a second `begin()`, in a `def` consumer, or when the consumer ended the transaction
                itself. The delivery then goes to the dead letters: running it again would repeat half an effect.
        """
        self._enter("begin()")
        return self._begin()

    def connection(self) -> AbstractAsyncContextManager[LentConnection]:
        """asyncpg's connection in such a transaction, in place of `begin()`: for an effect that is plain SQL.

        It costs the worker less than a session, and knows neither models nor `publish`.

        Raises:
            DeliveryError: as `begin()`, and for both in one run.
        """
        self._enter("connection()")
        return self._connection()

    def read(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A read-only session, for what must be known before an effect outside the database."""
        if not self._is_async:
            raise DeliveryError("a `def` consumer has no session: make it `async def`, or pass it what it needs")
        return self._read()

    def _enter(self, name: str) -> None:
        if not self._is_async:
            raise DeliveryError(f"a `def` consumer cannot call {name}: make it `async def`, or return to complete it")
        if self._progress.begun:
            raise DeliveryError(f"{name} comes second: put all that must happen together into one block, entered once")
        self._progress.begun = True

    @asynccontextmanager
    async def _begin(self) -> AsyncIterator[AsyncSession]:
        self._progress.unreached = True
        async with self._sessions(mark=str(self._claim.token)) as session:
            driver = await self._start(session)
            self._progress.unreached = False
            try:
                yield session
                assert isinstance(session, OneTransaction)
                session.sync_session.check()
                if session.sync_session.has_to_flush:
                    await session.flush()
                if not _begun(driver):  # the consumer has executed nothing
                    await session.execute(text("SELECT 1"))
                await self._complete(driver)
                await commit(session)
            finally:
                if not _begun(driver):
                    self._progress.unreached = driver.is_closed()
        self._progress.completed = True

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[LentConnection]:
        self._progress.unreached = True
        async with self._connections(str(self._claim.token), self._first) as lent:
            self._progress.unreached = False
            yield lent
            await self._complete(cast("Connection", lent))  # it does what is asked of one
        self._progress.completed = True

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[AsyncSession]:
        self._progress.unreached = True
        async with self._sessions(info={READ_ONLY: True}) as session:
            try:
                await session.connection(execution_options={"postgresql_readonly": True})
            except OSError as error:
                raise DatabaseUnavailableError("PostgreSQL cannot be reached") from error
            self._progress.unreached = False
            yield session
            if session.new or session.dirty or session.deleted:
                raise DeliveryError("delivery.read() is never committed: write inside `async with delivery.begin()`")

    async def _start(self, session: AsyncSession) -> Connection:
        try:
            connection = await session.connection()
            assert connection.sync_connection is not None
            raw = connection.sync_connection.connection  # `get_raw_connection()` would go there by way of a greenlet
            driver: Connection | None = raw.driver_connection
            assert driver is not None
            assert raw.dbapi_connection is not None
            start = self._first(driver)
            # asyncpg answers isinstance() with True for every connection.
            if type(driver) is PreparedBegin and raw.dbapi_connection.isolation_level == "read_committed":
                driver.prepare_begin(start)
                return driver
            isolation = (await connection.exec_driver_sql(start)).one().isolation
        except OSError as error:
            raise DatabaseUnavailableError("PostgreSQL cannot be reached") from error
        if not driver.is_in_transaction():
            raise DeliveryError("a delivery needs a transaction: do not set AUTOCOMMIT on the engine")
        if isolation != "read committed":
            # The heartbeat changes the row meanwhile; above READ COMMITTED the complete would fail for ever.
            raise DeliveryError(f"a delivery runs at READ COMMITTED, not {isolation.upper()}")
        return driver

    def _first(self, driver: Connection) -> str:
        """What comes first in the transaction."""
        timeout = "transaction_timeout" if has_transaction_timeout(driver) else "statement_timeout"
        return _START.format(token=self._claim.token, timeout=timeout, milliseconds=self._timeout_ms)

    async def _complete(self, driver: Connection) -> None:
        self._progress.claims_next = claims_next = self._progress.may_claim_next()
        unbroken, completed = await delivering.complete_in_transaction(driver, self._claim, claims_next=claims_next)
        if not unbroken:
            raise DeliveryError("the delivery's transaction was committed or rolled back inside its block")
        if not completed:
            self._progress.lost = True
            raise LeaseLostError


def _begun(driver: Connection) -> bool:
    return type(driver) is not PreparedBegin or driver.begun
