"""What commands share: options, a database connection, exit codes, and one line per error.

What must stay true: whatever a person did wrong, or whatever is down, they read one line on stderr that says what to
do, never a traceback and never a password.
"""

from __future__ import annotations

import asyncio
import getpass
import re
import socket
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import asyncpg
import typer

from service.database.driver import open_connection, read_json
from service.errors import ServiceError
from service.ledger.message import is_queue_name
from service.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from service.database.driver import Connection
    from service.settings import DatabaseSettings

T = TypeVar("T")

By = Annotated[str | None, typer.Option(help="Who does it, for the record; by default your user and host.")]
Why = Annotated[str | None, typer.Option(help="Why, for the record.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhd])")
_UNREACHABLE = (
    OSError,  # includes TimeoutError and name resolution
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
)


class Exit(IntEnum):
    """The exit codes, as `outbox --help` documents them."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    INTERRUPTED = 130


class CommandError(ServiceError):
    """A command cannot do what it was asked; the message says what to do instead."""

    def __init__(self, message: str, code: Exit = Exit.USAGE) -> None:
        super().__init__(message)
        self.code = code


@asynccontextmanager
async def connect(settings: DatabaseSettings) -> AsyncIterator[Connection]:
    """A connection for one command; what goes wrong on it is raised as a `CommandError`."""
    connection: Connection | None = None
    try:
        connection = await open_connection(settings, "outbox-cli")
        await read_json(connection)
        yield connection
        await connection.close(timeout=settings.connect_timeout)
    except (asyncpg.PostgresError, *_UNREACHABLE) as error:
        # Writing to a closed pipe is an OSError too, and none of the database's.
        if isinstance(error, BrokenPipeError):
            raise
        raise database_problem(error, settings) from None
    finally:
        if connection is not None and not connection.is_closed():
            connection.terminate()


def ask(question: Callable[[Connection], Awaitable[T]]) -> T:
    """What the database answers, on a connection for this question alone."""

    async def answer() -> T:
        async with connect(load_settings().database) as connection:
            return await question(connection)

    return asyncio.run(answer())


def database_problem(error: BaseException, settings: DatabaseSettings) -> CommandError:
    """One line for an error of the database: what it is and what to do about it."""
    address = settings.address
    where, user = address.where, address.parameters.get("user", "")
    match error:
        case asyncpg.UndefinedTableError() | asyncpg.UndefinedColumnError() | asyncpg.UndefinedFunctionError():
            message = (
                f"the database {where} lacks the outbox's tables or their newest version: run `alembic upgrade heads`"
            )
        case asyncpg.InvalidCatalogNameError():
            message = f"PostgreSQL has no database {where}: create it, or correct DATABASE__URL"
        case asyncpg.InvalidAuthorizationSpecificationError():
            message = f"PostgreSQL at {where} refuses user {user!r}: check user and password in DATABASE__URL"
        case asyncpg.InsufficientPrivilegeError():
            message = f"the role {user!r} may not do this ({error}): use the relay's or an operator's role"
        case _ if isinstance(error, _UNREACHABLE):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            message = f"cannot reach PostgreSQL at {where} ({reason}): is it running, and is DATABASE__URL right?"
        case _:
            return CommandError(f"PostgreSQL refused: {str(error).splitlines()[0]}", Exit.FAILED)
    return CommandError(message, Exit.UNREACHABLE)


def queue_name(text: str) -> str:
    """The name of one queue, if it may be one."""
    if not is_queue_name(text):
        raise CommandError(f"{text!r} is no queue name: letters, digits, _ and -, at most 100")
    return text


def parse_duration(text: str, option: str) -> timedelta:
    """`30s`, `5m`, `2h` or `7d`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) * _UNITS[match[2]] > 3_660 * 86_400:
        raise CommandError(f"{option}: {text!r} is no duration; expected something like 30s, 5m, 2h or 7d")
    return timedelta(seconds=float(match[1]) * _UNITS[match[2]])


def parse_moment(text: str, now: datetime, option: str) -> datetime:
    """A duration before now, or an ISO timestamp (UTC where it has no offset)."""
    if _DURATION.fullmatch(text.strip()):
        return now - parse_duration(text, option)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(
            f"{option}: {text!r} is no time; expected 2h (two hours ago) or 2026-11-20T14:30:00+00:00"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


async def parse_span(
    connection: Connection, since: str | None, until: str | None
) -> tuple[datetime | None, datetime | None]:
    """What `--since` and `--until` say, by PostgreSQL's clock."""
    now: datetime = await connection.fetchval("SELECT clock_timestamp()")
    first = parse_moment(since, now, "--since") if since else None
    return first, parse_moment(until, now, "--until") if until else None


def whoami() -> str:
    """Who runs this command, for the audit record."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
