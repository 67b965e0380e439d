"""SQLAlchemy's engine and its pool: every wait is bounded, and no connection is lent that will not do.

What must stay true: an outage of PostgreSQL is one error, whichever way it shows; and what a request or a delivery
is lent can write.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError, EmulatedDBAPIException
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from service.database.driver import DRIVER_ERRORS, PreparedBegin, has_transaction_timeout, open_connection
from service.errors import DatabaseUnavailableError
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from sqlalchemy.engine import ExceptionContext
    from sqlalchemy.pool import PoolProxiedConnection

    from service.settings import DatabaseSettings

_log = get_logger(__name__)

_TELL_EVERY = 60.0
"""Seconds between the log's lines on a pool that has none left."""


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
        server_settings = {"plan_cache_mode": "force_custom_plan", "idle_session_timeout": "0"}
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


def pool_timeouts(engine: AsyncEngine) -> int:
    """How often somebody waited for a connection of this engine until `pool_timeout` was over."""
    assert isinstance(engine.pool, _Pool)
    return engine.pool.timeouts


class _Pool(AsyncAdaptedQueuePool):
    """Raises one error where no connection can be had, and counts who waited in vain because all are in use.

    The driver lets bare `OSError`s through, which nobody could tell from those of a handler's own files and sockets,
    and what breaks while a new connection is set up reaches nobody who would translate it.
    """

    timeouts = 0
    _tell_at = 0.0

    def connect(self) -> PoolProxiedConnection:
        """A connection.

        Raises:
            DatabaseUnavailableError: when PostgreSQL cannot be reached or refuses one.
            sqlalchemy.exc.TimeoutError: when all were in use until `pool_timeout` was over.
        """
        try:
            return super().connect()
        except PoolTimeoutError:
            self.timeouts += 1
            if time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + _TELL_EVERY
                _log.warning("database.pool_exhausted", connections=self.size(), timeouts=self.timeouts)
            raise
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
