"""The one way to a database session, and the one place where a request's transaction commits.

What must stay true: a handler never calls `commit()`. One request is one transaction; the session dependency commits
it after the handler returned and before the response leaves, so a success status means committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator  # noqa: TC003  FastAPI resolves the dependency's annotations at run time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from uuid import uuid4

from fastapi import Depends, Request
from sqlalchemy import MetaData, event, text
from sqlalchemy.exc import DisconnectionError, EmulatedDBAPIException
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Session as SyncSession
from sqlalchemy.pool import AsyncAdaptedQueuePool

from service.driver import DRIVER_ERRORS, PreparedBegin, has_transaction_timeout
from service.errors import DatabaseUnavailableError, TransactionError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, ExceptionContext
    from sqlalchemy.orm import SessionTransaction
    from sqlalchemy.pool import PoolProxiedConnection

    from service.settings import DatabaseSettings

__all__ = [
    "Base",
    "FlushingSession",
    "OneTransaction",
    "Session",
    "SessionFactory",
    "commit",
    "create_engine",
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
    connect_args: dict[str, Any] = {"timeout": settings.connect_timeout, "connection_class": PreparedBegin}
    if settings.pooler:
        # A pooler in transaction mode hands out another server connection for every transaction: no prepared
        # statement and no session setting may outlive one, and statement names must not collide.
        connect_args |= {
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
        }
    else:
        # A plan kept since a table was small would read all of it when it is large.
        server_settings = {
            "application_name": application_name,
            "plan_cache_mode": "force_custom_plan",
            "idle_session_timeout": "0",
        }
        if statement_timeout is not None:
            server_settings["statement_timeout"] = f"{int(statement_timeout * 1000)}"
            server_settings["idle_in_transaction_session_timeout"] = f"{int(statement_timeout * 1000)}"
        connect_args["server_settings"] = server_settings
    engine = create_async_engine(
        settings.sqlalchemy_url,
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
        if dbapi_connection.driver_connection.is_closed():
            raise DisconnectionError

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
    must stay true: whatever flushes objects (a query, a savepoint, a commit by whichever way) also runs these; and they
    are forgotten with the transaction that they belong to, and no sooner.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._statements: list[Callable[[Connection], object]] = []
        self._committing = False

    def at_flush(self, statement: Callable[[Connection], object]) -> bool:
        """Run `statement` with the next flush, at the latest when the transaction commits.

        Returns:
            False where an object has to be added instead: in a savepoint, which may undo it, and once a commit has
            begun, even a savepoint's, after which SQLAlchemy flushes again for objects only.
        """
        if self._committing or self.in_nested_transaction():
            return False
        self._statements.append(statement)
        return True

    @property
    def inserts(self) -> bool:
        """Whether a flush would insert something."""
        return bool(self.new or self._statements)

    def flush(self, objects: Sequence[Any] | None = None) -> None:
        """As SQLAlchemy's, and then the statements. One that fails stays, so that no commit can succeed without it."""
        super().flush(objects)
        while self._statements:
            self._statements[0](self.connection())
            del self._statements[0]


@event.listens_for(FlushingSession, "before_commit")
def _before_commit(session: FlushingSession) -> None:
    session._committing = True  # noqa: SLF001
    session.flush()


@event.listens_for(FlushingSession, "after_transaction_end")
def _after_transaction_end(session: FlushingSession, ended: SessionTransaction) -> None:
    if ended.parent is None:
        session._committing = False  # noqa: SLF001
        session._statements.clear()  # noqa: SLF001


class OneTransaction(AsyncSession):
    """A session whose owner commits it: a handler or consumer that did so itself would split its work in two.

    A handler that rolled back and went on would answer with success for writes and events that are gone.
    """

    sync_session_class = FlushingSession

    async def commit(self) -> NoReturn:
        """Refused.

        Raises:
            TransactionError: always.
        """
        raise TransactionError("the transaction commits when its owner ends it: remove the commit()")

    async def rollback(self) -> NoReturn:
        """Refused.

        Raises:
            TransactionError: always.
        """
        raise TransactionError("there is one transaction: use begin_nested() for what may be undone, or raise")


async def commit(session: AsyncSession) -> None:
    """Commit, and notice an error that the caller swallowed.

    PostgreSQL answers COMMIT in an aborted transaction with a ROLLBACK and no error; a statement before it raises.
    What is inserted here, an event for instance, is such a statement.
    """
    if not session.in_transaction():
        return
    sync = session.sync_session
    inserts = sync.inserts if isinstance(sync, FlushingSession) else bool(session.new)
    await session.flush()
    if not inserts:
        await session.execute(text("SELECT 1"))
    await AsyncSession.commit(session)


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
