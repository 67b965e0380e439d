"""The one way to a database session, and the one place where a request's transaction commits.

What must stay true: a handler never calls `commit()`. One request is one transaction; the session dependency commits
it after the handler returned and before the response leaves, so a success status means committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator  # noqa: TC003  FastAPI resolves the dependency's annotations at run time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import uuid4

from fastapi import Depends, Request
from sqlalchemy import MetaData, event, text
from sqlalchemy.exc import DisconnectionError, EmulatedDBAPIException
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Session as SyncSession
from sqlalchemy.pool import AsyncAdaptedQueuePool

from service.database.driver import DRIVER_ERRORS, ENDED, PreparedBegin, has_transaction_timeout, open_connection
from service.errors import DatabaseUnavailableError, TransactionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from sqlalchemy.engine import Connection, ExceptionContext
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.pool import PoolProxiedConnection

    from service.settings import DatabaseSettings

__all__ = [
    "Base",
    "FlushingSession",
    "LentSession",
    "OneTransaction",
    "Session",
    "SessionFactory",
    "commit",
    "confirm",
    "create_engine",
    "restart",
    "session_factory",
    "transaction",
]

SessionFactory = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    """Base of every mapped class; the naming convention keeps Alembic's constraint names stable."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def create_engine(
    settings: DatabaseSettings, *, application_name: str, statement_timeout: float | None = None
) -> AsyncEngine:
    """An engine at READ COMMITTED whose waits are all bounded.

    Args:
        settings: Where PostgreSQL is.
        application_name: Shown in `pg_stat_activity`.
        statement_timeout: Seconds; `None` where something else bounds the transaction.
    """
    connect_args: dict[str, Any] = {
        "async_creator_fn": partial(open_connection, settings, application_name),
        "connection_class": PreparedBegin,
        "command_timeout": None,
    }
    if settings.pooler:
        # A pooler in transaction mode hands out another server connection for every transaction: no prepared
        # statement and no session setting may outlive one, and statement names must not collide.
        connect_args |= {
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
        }
    else:
        # A plan kept since a table was small would read all of it when it is large.
        server_settings = {
            "plan_cache_mode": "force_custom_plan",
            "idle_session_timeout": "0",
        }
        if statement_timeout is not None:
            server_settings["statement_timeout"] = f"{int(statement_timeout * 1000)}"
            server_settings["idle_in_transaction_session_timeout"] = f"{int(statement_timeout * 1000)}"
        connect_args["server_settings"] = server_settings
    engine = create_async_engine(
        "postgresql+asyncpg://",
        isolation_level="READ COMMITTED",
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_pre_ping=False,
        pool_use_lifo=True,
        hide_parameters=True,  # they would stand in logs and in stored errors
        poolclass=_Pool,
        connect_args=connect_args,
    )
    _drop_useless_connections(engine)
    if not settings.pooler:
        _lift_transaction_timeout(engine)
    return engine


class _Pool(AsyncAdaptedQueuePool):
    """Raises one error where no connection can be had.

    The driver lets bare `OSError`s through, which nobody could tell from those of a handler's own files and sockets,
    and what breaks while a new connection is set up reaches nobody who would translate it.
    """

    def connect(self) -> PoolProxiedConnection:
        """A connection.

        Raises:
            DatabaseUnavailableError: when PostgreSQL cannot be reached or refuses one.
        """
        try:
            return super().connect()
        except (*DRIVER_ERRORS, EmulatedDBAPIException) as error:
            raise DatabaseUnavailableError(f"cannot connect: {type(error).__name__}: {error}") from error


def _lift_transaction_timeout(engine: AsyncEngine) -> None:
    """Let no default of the database role end a transaction that something else bounds."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(dbapi_connection: Any, _record: Any) -> None:
        if has_transaction_timeout(dbapi_connection.driver_connection):
            dbapi_connection.run_async(lambda driver: driver.execute("SET transaction_timeout = 0"))


def _drop_useless_connections(engine: AsyncEngine) -> None:
    """Never lend a connection that PostgreSQL has closed, nor keep one that broke or to a server that only reads.

    The first is known without asking PostgreSQL. The last is a standby before its promotion, or a role that was
    read-only when the session began; the session would stay so. A session that asked to be read-only is in order.
    """

    @event.listens_for(engine.sync_engine, "checkout")
    def checkout(dbapi_connection: Any, _record: Any, _proxy: Any) -> None:
        driver = dbapi_connection.driver_connection
        if driver.is_closed():
            raise DisconnectionError
        driver.take_back()

    @event.listens_for(engine.sync_engine, "handle_error")
    def handle_error(context: ExceptionContext) -> None:
        if isinstance(context.original_exception, OSError):
            # The driver lets it through when the connection breaks in use.
            context.is_disconnect = True
            raise DatabaseUnavailableError("the connection to PostgreSQL broke") from context.original_exception
        if context.connection is not None and getattr(context.original_exception, "sqlstate", None) == "25006":
            asked: Any = context.connection.connection.dbapi_connection
            context.is_disconnect = not asked.readonly


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
        """Refused while it is lent."""
        self._refuse("there is one transaction: use begin_nested() for what may be undone, or raise")
        super().rollback()

    def close(self) -> None:
        """Refused while it is lent."""
        self._refuse("the session is closed by its owner: remove the close()")
        super().close()

    def reset(self) -> None:
        """Refused while it is lent."""
        self._refuse("there is one transaction: remove the reset()")
        super().reset()

    def invalidate(self) -> None:
        """Refused while it is lent."""
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
        await super().__aexit__(type_, value, traceback)

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
    await session.flush()
    driver = sync.driver if isinstance(sync, LentSession) else None
    if driver is None:
        await session.execute(text("SELECT 1"))
    else:
        driver.may_commit = True  # it sends a statement before it
    if isinstance(sync, LentSession):
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


async def _request_session(request: Request) -> AsyncIterator[AsyncSession]:
    sessions: SessionFactory = request.app.state.sessions
    async with transaction(sessions) as session:
        yield session


# The scope matters: a plain dependency with `yield` ends after the response was sent, so a client could read
# "201 Created" of an order whose commit then fails.
Session = Annotated[AsyncSession, Depends(_request_session, scope="function")]
"""The request's session: `async def handler(session: Session)`. Commits when the handler returns."""
