"""Sessions, and how the transaction of one is lent, guarded and committed.

What must stay true: whoever is lent a session cannot end its transaction, and its owner commits all of it or nothing.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session as SyncSession

from service.database.driver import ENDED, PreparedBegin
from service.errors import TransactionError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from typing import Self

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import SessionTransaction

SessionFactory = async_sessionmaker[AsyncSession]


def session_factory(engine: AsyncEngine, class_: type[AsyncSession] = AsyncSession) -> SessionFactory:
    """Sessions that stay readable after a commit and refuse all use after `close()`.

    A session that could be used again after its request would take an event that nobody commits.
    """
    return async_sessionmaker(engine, class_=class_, expire_on_commit=False, close_resets_only=False)


class FlushingSession(SyncSession):
    """A session whose flush also runs statements that need no unit of work, after its objects.

    To insert a row whose values are known, the unit of work takes several times as long as the statement does. What
    must stay true: whatever flushes objects (a query, a savepoint, a commit by whichever way) also runs these; they are
    forgotten with the transaction or savepoint that they belong to, and no sooner; and nothing can take them out, as
    `expunge_all()` does with objects.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._statements: list[Callable[[Connection], object]] = []

    def at_flush(self, statement: Callable[[Connection], object]) -> None:
        """Run `statement` with the next flush, at the latest when the transaction commits."""
        self._statements.append(statement)

    @property
    def has_to_flush(self) -> bool:
        """Whether a flush would do anything: also to do nothing it takes a greenlet."""
        return not self._is_clean()

    def _is_clean(self) -> bool:
        """Whether a flush has nothing to do: SQLAlchemy goes on flushing until then, before a commit."""
        return super()._is_clean() and not self._statements

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's, and then the statements. One that fails stays, so that no commit can succeed without it."""
        super().flush(objects)
        while self._statements:
            self._statements[0](self.connection())
            del self._statements[0]


@event.listens_for(FlushingSession, "after_rollback")
def _after_rollback(session: FlushingSession) -> None:
    session._statements.clear()  # noqa: SLF001  a savepoint begins with a flush, so these are its own


class LentSession(FlushingSession):
    """A session whose owner ends its transaction: whoever did so behind its back would split the work in two.

    A handler that committed and then failed would leave half of its work; one that rolled back and went on would answer
    with success for writes and events that are gone. What can be refused at the call is refused there. What cannot is
    found at the end: it must still be the transaction that began, by a mark that PostgreSQL keeps for it.

    Attributes:
        mark: The mark, new for each session.
        lent: Whether somebody else than its owner has it.
        ended: Whether a transaction of it has ended.
        driver: The connection of the transaction that began, as `PreparedBegin` if that is what it is.
    """

    lent = False
    ended = False
    driver: PreparedBegin | None = None

    def __init__(self, *args: Any, mark: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mark = mark or str(uuid4())

    def commit(self) -> None:
        """Refused while it is lent, as all of these."""
        self._refuse("the transaction commits when its owner ends it: remove the commit()")
        super().commit()

    def rollback(self) -> None:
        self._refuse("there is one transaction: use begin_nested() for what may be undone, or raise")
        super().rollback()

    def close(self) -> None:
        self._refuse("the session is closed by its owner: remove the close()")
        super().close()

    def reset(self) -> None:
        self._refuse("there is one transaction: remove the reset()")
        super().reset()

    def invalidate(self) -> None:
        self._refuse("the session is closed by its owner: remove the invalidate()")
        super().invalidate()

    def _refuse(self, why: str) -> None:
        if self.lent:
            raise TransactionError(why)

    def check(self) -> None:
        """Before the owner commits.

        Raises:
            TransactionError: when the transaction has been ended.
        """
        driver = self.driver
        if self.ended or (driver is not None and driver.mark != self.mark and not driver.is_closed()):
            raise TransactionError(ENDED)


@event.listens_for(LentSession, "after_begin")
def _after_begin(session: LentSession, _transaction: SessionTransaction, connection: Connection) -> None:
    driver = connection.connection.driver_connection
    # asyncpg answers isinstance() with True for every connection.
    if session.lent and session.driver is None and type(driver) is PreparedBegin:
        session.driver = driver
        driver.lend(session.mark)


@event.listens_for(LentSession, "after_transaction_end")
def _after_transaction_end(session: LentSession, ended: SessionTransaction) -> None:
    if ended.parent is None:
        session.ended = True


class OneTransaction(AsyncSession):
    """A session with one transaction, lent by whoever enters it: `async with sessions() as session`."""

    sync_session_class = LentSession
    sync_session: LentSession

    async def __aenter__(self) -> Self:
        if self.sync_session.lent:
            raise TransactionError("the session has been entered by its owner: use it without `async with`")
        self.sync_session.lent = True
        return self

    async def __aexit__(self, type_: Any, value: Any, traceback: Any) -> None:
        self.sync_session.lent = False
        if self.sync_session.in_transaction():
            await super().__aexit__(type_, value, traceback)
        else:  # there is nothing to wait for, and SQLAlchemy would wait in a task of its own
            self.sync_session.close()

    def begin(self) -> NoReturn:
        """Refused.

        Raises:
            TransactionError: always.
        """
        raise TransactionError("the transaction begins by itself and commits when its owner ends it: remove begin()")


async def commit(session: AsyncSession) -> None:
    """Commit what was lent, if it is whole; and notice an error that the caller swallowed.

    PostgreSQL answers COMMIT in an aborted transaction with a ROLLBACK and no error; a statement before it raises.

    Raises:
        TransactionError: when the transaction has been ended by somebody else.
    """
    sync = session.sync_session
    if isinstance(sync, LentSession):
        sync.check()
    if not session.in_transaction():
        return
    if not isinstance(sync, FlushingSession) or sync.has_to_flush:
        await session.flush()
    if not isinstance(sync, LentSession) or sync.driver is None:  # or it has begun, and nothing has been sent in it
        await session.execute(text("SELECT 1"))
    if isinstance(sync, LentSession):
        if sync.driver is not None:
            sync.driver.may_commit = True  # it sends a statement before it
        sync.lent = False
    await session.commit()


async def restart(session: AsyncSession) -> None:
    """Undo all that was done in the session, and begin again. For its owner."""
    sync = session.sync_session
    assert isinstance(sync, LentSession)
    sync.check()
    sync.lent = False
    await session.rollback()
    sync.lent, sync.ended, sync.driver = True, False, None


async def confirm(session: AsyncSession) -> None:
    """Let the commit of this transaction wait, as for a write, until what it has read is as safe as what it writes.

    A commit whose client did not wait for a synchronous standby is visible and may yet be lost in a failover. Whoever
    answers with success from what it only read would promise it; a transaction that writes nothing waits for nobody.
    """
    await session.execute(text("SELECT pg_logical_emit_message(true, 'outbox', '')"))


@asynccontextmanager
async def transaction(sessions: SessionFactory) -> AsyncIterator[AsyncSession]:
    """A session whose work is committed at the end of the block, or rolled back if the block raises."""
    async with sessions() as session:
        yield session
        await commit(session)
