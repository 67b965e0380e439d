"""Connections of the asyncpg driver itself: for the engine, for the ledger's own statements and the command line.

What must stay true: `open_connection` opens all of them, so that TLS, time-outs and hosts are the same for every
process.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from service.errors import TransactionError
from service.network.sockets import notice_silence

if TYPE_CHECKING:
    from service.network.postgres_url import Host, PostgresAddress
    from service.settings import DatabaseSettings

    Connection = asyncpg.Connection[asyncpg.Record]
else:
    Connection = asyncpg.Connection  # it takes no parameter when the program runs

# asyncpg raises an InternalClientError, which is none of its other errors, when a connection breaks while it is used.
DRIVER_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a connection of asyncpg's own may raise when PostgreSQL refuses something or goes away."""

CONTENT_ERRORS = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.ProgramLimitExceededError)
"""Those of them that are about the values of a statement (SQLSTATE 22, 23, 54): it fails again, however often."""

# Every statement of the ledger's own finds its rows by an index, however small the table is when it is planned. Plans
# may then be kept for good: made anew for each call, they cost twice as much as the statements.
_BY_INDEX = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}

_BEGIN_WITHIN = 10.0
"""Seconds for a server to answer BEGIN, which waits for nothing; one that has vanished would never answer."""

_ENDS = re.compile(
    r"(?:\s|;|--[^\n]*\n|/\*.*?\*/)*(?:(?:COMMIT|END|ABORT|ROLLBACK(?!(?:\s+WORK|\s+TRANSACTION)?\s+TO))\b|PREPARE\s+TRANS)",
    re.IGNORECASE | re.DOTALL,
)
"""Statements that end a transaction."""

# In a transaction that failed it raises, where COMMIT alone would be answered with a ROLLBACK and no error. The mark is
# no number: its conversion fails, with an error that has the mark in it.
_COMMIT = """
SELECT CASE WHEN coalesce(current_setting('outbox.transaction', true), '') <> '{mark}'
            THEN ('{mark}' || pg_backend_pid())::int END;
COMMIT
"""


def refuse_to_end(query: str) -> None:
    """Whoever was lent a transaction does not end it.

    Raises:
        TransactionError: for a statement that would.
    """
    if _ENDS.match(query):
        raise TransactionError("SQL may not end the transaction that is lent: remove the statement, or raise")


ENDED = "the transaction was committed or rolled back inside its block: leave that to whoever lent the session"


class PreparedBegin(Connection):
    """A connection that begins a transaction in bounded time, and in one round trip with what must come first in it.

    A transaction can be lent: then only its owner commits it, and only if it still is the one that began. For that it
    is marked, by a setting that is gone with the transaction.

    SQLAlchemy sends BEGIN with the first statement of a transaction, not before. So what is prepared for it may wait.

    Attributes:
        mark: Of the transaction that is lent, from `lend` to its end; else empty.
        may_commit: Set by the owner, for the COMMIT that follows.
    """

    mark = ""
    may_commit = False
    _first = ""

    def prepare_begin(self, statement: str) -> None:
        """Send `statement`, which has no parameters, with the next BEGIN, in place of what was prepared for it before.

        In a transaction that is lent it must also set the mark, as what `lend` prepares does.
        """
        self._first = statement

    @property
    def begun(self) -> bool:
        """Whether the BEGIN that something was prepared for has succeeded."""
        return not self._first

    def lend(self, mark: str) -> None:
        """Mark the transaction that begins next, and let nobody but its owner commit it."""
        self.mark, self.may_commit = mark, False
        self.prepare_begin(f"SET LOCAL outbox.transaction = '{mark}'")

    def take_back(self) -> None:
        """Nothing is lent or prepared any more."""
        self.mark = self._first = ""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:  # noqa: ASYNC109  asyncpg's
        """As asyncpg's own, which runs BEGIN, COMMIT and ROLLBACK by it."""
        if args or not query.startswith("BEGIN"):
            if self.mark and not args and _ENDS.match(query):
                return await self._end(query, timeout)
            status = await super().execute(query, *args, timeout=timeout)
            if self.mark and self.begun and not self.is_in_transaction():  # the last of several statements
                self.mark = ""
                raise TransactionError(ENDED)
            return status
        try:
            status = await super().execute(query + self._first, timeout=timeout or _BEGIN_WITHIN)
        except BaseException as error:
            # The transaction may have begun, and whoever asked for it believes that it has not.
            self.terminate()
            if isinstance(error, TimeoutError):
                raise asyncpg.ConnectionDoesNotExistError("PostgreSQL did not answer BEGIN") from error
            raise
        self._first = ""
        return status

    async def _end(self, query: str, timeout: float | None) -> str:  # noqa: ASYNC109
        mark, self.mark = self.mark, ""
        if query.startswith("ROLLBACK"):
            return await super().execute(query, timeout=timeout)
        try:
            if self.may_commit and query.startswith("COMMIT"):
                return await super().execute(_COMMIT.format(mark=mark), timeout=timeout)
            raise TransactionError("the transaction commits when its owner ends it: remove the commit")
        except (asyncpg.PostgresError, TransactionError) as error:
            if self.is_in_transaction():  # whoever committed takes it for ended
                await super().execute("ROLLBACK")
            if isinstance(error, asyncpg.InvalidTextRepresentationError) and mark in str(error):
                raise TransactionError(ENDED) from error
            raise

    def prepare(self, query: str, **options: Any) -> Any:
        """As asyncpg's own, by which SQLAlchemy runs what it was given.

        Raises:
            TransactionError: for a statement that would end a transaction that is lent.
        """
        if self.mark:
            refuse_to_end(query)
        return super().prepare(query, **options)


_ANOTHER_MAY_DO = (
    OSError,  # includes TimeoutError, and a certificate that is not to be trusted
    asyncpg.CannotConnectNowError,
    asyncpg.PostgresConnectionError,
    asyncpg.TargetServerAttributeNotMatched,
)

_first: dict[tuple[Host, ...], int] = {}
"""Of several hosts, which one to begin with: one that did not do is the last to be asked again."""


async def open_connection(settings: DatabaseSettings, application_name: str, **more: Any) -> Connection:
    """A connection to the first host that will do. Every connection of every process is opened here.

    Each host has its share of `connect_timeout`: one that does not answer leaves the others theirs.

    Args:
        settings: Where PostgreSQL is.
        application_name: Shown in `pg_stat_activity`, before what the URL has of it.
        more: Further arguments of `asyncpg.connect`; its `server_settings` only where no pooler would refuse them.

    Raises:
        OSError: or another of `DRIVER_ERRORS`, that of the host which was asked last.
    """
    address = settings.address
    arguments = _arguments(settings, address, application_name, more)
    loop = asyncio.get_running_loop()
    deadline, count = loop.time() + settings.connect_timeout, len(address.hosts)
    first = _first.get(address.hosts, 0)
    for left in range(count, 0, -1):
        number = (first + count - left) % count
        host, port = address.hosts[number]
        share = (deadline - loop.time()) / left
        try:
            connection: Any = await asyncpg.connect(**arguments, host=host, port=port, timeout=share)
        except (*_ANOTHER_MAY_DO, asyncio.CancelledError) as error:
            _first[address.hosts] = (number + 1) % count
            if left == 1 or isinstance(error, asyncio.CancelledError):
                raise
        else:
            # asyncpg has no option for it, and a connection that is being made has a timeout.
            notice_silence(connection._transport.get_extra_info("socket"), settings.silence_timeout)  # noqa: SLF001
            return cast("Connection", connection)
    raise AssertionError("an address has a host")


def _arguments(
    settings: DatabaseSettings, address: PostgresAddress, application_name: str, more: dict[str, Any]
) -> dict[str, Any]:
    name = f"{application_name} {address.application_name}".rstrip()
    cache = {"statement_cache_size": 0} if settings.pooler else {}
    arguments = {"dsn": address.dsn, "command_timeout": 30} | more | cache
    return arguments | {"server_settings": {"application_name": name} | more.get("server_settings", {})}


async def connect(settings: DatabaseSettings, application_name: str) -> Connection:
    """A connection for the ledger's own statements, its waits bounded."""
    connection = await open_connection(settings, application_name)
    try:
        if not settings.pooler:
            await bound_waits(connection)
    except BaseException:
        connection.terminate()
        raise
    return connection


def has_transaction_timeout(connection: Connection) -> bool:
    """Whether the server can limit a transaction as a whole."""
    return connection.get_server_version() >= (17,)


async def bound_waits(connection: Connection, **more: str) -> None:
    """Set what defaults of the database or role could end, hang or fail a statement with: timeouts, isolation, plans.

    They are set here and not when connecting, where a pooler would refuse them; behind one in transaction mode they
    would reach other sessions, so there they are the pooler's to set.
    """
    bounds = {
        # A row that somebody has changed meanwhile is looked at again; above this it is an error.
        "default_transaction_isolation": "read committed",
        "statement_timeout": "30s",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": "10s",
        "idle_session_timeout": "0",
        **({"transaction_timeout": "0"} if has_transaction_timeout(connection) else {}),
        **_BY_INDEX,
        **more,
    }
    calls = ", ".join(f"set_config('{name}', ${number}, false)" for number, name in enumerate(bounds, start=1))
    await connection.execute(f"SELECT {calls}", *bounds.values())


async def read_json(connection: Connection) -> None:
    """Let JSON columns come as Python's values, as `dead_letters` and `history` of the ledger expect them."""
    await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
