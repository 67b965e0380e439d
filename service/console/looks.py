"""The console's connections to PostgreSQL, and answers that all who look share.

What must stay true: whatever is asked of the console and by however many, a few connections ask PostgreSQL, each
statement ends within a few seconds, and what is dear to answer is asked for a twentieth of the time at most. So nobody
who looks slows down who works.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import asyncpg

from service.database.driver import DRIVER_ERRORS, open_connection, read_json
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Hashable

    from service.database.driver import Connection
    from service.settings import DatabaseSettings

T = TypeVar("T")

_log = get_logger(__name__)

LONGEST = 3.0
"""Seconds that a statement of a page may take."""

TIMES_ITS_COST = 20
"""For so many times as long as it took to get it, an answer stands."""

STALE = 60.0
"""Seconds after which an answer is no longer shown while a new one is asked for."""

_WAIT = 5.0
_PATIENCE = 2.0

# Parallel workers and compiled plans would take from who works; the limits keep nobody waiting for who only looks.
_SESSION = {
    "default_transaction_isolation": "read committed",
    "lock_timeout": "1000",
    "idle_in_transaction_session_timeout": "10000",
    "idle_session_timeout": "0",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
}


class ConsolePool:
    """Lends connections that read JSON: `async with pool() as connection`."""

    def __init__(
        self, settings: DatabaseSettings, name: str, *, size: int = 4, longest: float = LONGEST, acting: bool = False
    ) -> None:
        async def connect(dsn: str | None = None, **arguments: Any) -> Connection:  # noqa: ARG001  asyncpg gives it
            return await open_connection(settings, name, **arguments)

        async def prepare(connection: Connection) -> None:
            await read_json(connection)
            if not settings.pooler:
                session = _SESSION | {
                    "statement_timeout": f"{longest * 1000:.0f}",
                    "default_transaction_read_only": "off" if acting else "on",
                }
                calls = ", ".join(f"set_config('{key}', '{value}', false)" for key, value in session.items())
                await connection.execute(f"SELECT {calls}")

        self._pool = asyncpg.create_pool(
            min_size=0,
            max_size=size,
            connect=connect,
            init=prepare,
            reset=_keep,
            max_inactive_connection_lifetime=30,
            command_timeout=longest + _PATIENCE,
        )

    async def open(self) -> None:
        """Be ready. PostgreSQL need not be up yet."""
        await self._pool

    def close(self) -> None:
        self._pool.terminate()

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Connection]:
        """A connection, once one is free.

        Raises:
            TimeoutError: when none is within 5 s.
        """
        async with self._pool.acquire(timeout=_WAIT) as lent:
            connection = cast("Connection", lent)  # a stand-in that does all that one does
            try:
                yield connection
            except (TimeoutError, asyncpg.ReadOnlySQLTransactionError):
                connection.terminate()  # it has gone silent, or leads to a server that only reads
                await self._pool.expire_connections()
                raise


async def _keep(_connection: Connection) -> None:
    """Nothing of the session is ever changed, so there is nothing to reset."""


@dataclass(frozen=True, slots=True)
class Look(Generic[T]):
    """What is known of an answer: itself, unless it is still being asked for or could not be had.

    Attributes:
        age: How old it is, in seconds.
        problem: Why the latest attempt to get it failed.
    """

    value: T | None
    age: float
    problem: Exception | None


class Shared(Generic[T]):
    """The latest answer to one question, which is asked again when somebody looks and it is time to.

    Args:
        ask: Gets an answer.
        kept: Seconds for which one stands at least.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], kept: float) -> None:
        self._ask = ask
        self._kept = kept
        self._answer: T | None = None
        self._problem: Exception | None = None
        self._answered_at = self._again_at = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def get(self) -> Look[T]:
        """What is known. Only who comes first, or after long, waits for it, and not for more than 2 s."""
        if time.monotonic() >= self._again_at and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._renew())
        if self._asking is not None and self._age() > max(STALE, 2 * self._kept):
            await asyncio.wait([self._asking], timeout=_PATIENCE)
        stale = self._age() > max(STALE, 2 * self._kept) and self._problem is not None
        return Look(None if stale else self._answer, self._age(), self._problem)

    async def _renew(self) -> None:
        began = time.monotonic()
        try:
            self._answer, self._problem = await self._ask(), None
            self._answered_at = time.monotonic()
        except DRIVER_ERRORS as error:
            self._problem = error
            _log.warning("console.not_answered", error=brief(error))
        except Exception as error:  # noqa: BLE001  a bug: nobody waits for this task who could tell
            self._problem = error
            _log.exception("console.failed")
        finally:
            now = time.monotonic()
            self._again_at = now + max(self._kept, TIMES_ITS_COST * (now - began))

    def forget(self) -> None:
        """Ask again when somebody looks: what it is about was changed here."""
        self._again_at = -math.inf

    def _age(self) -> float:
        return time.monotonic() - self._answered_at


class SharedByKey(Generic[T]):
    """The same for a question with parameters; of the many that somebody may make up, few answers are kept."""

    def __init__(self, ask: Callable[[Any], Awaitable[T]], kept: float, remembered: int = 64) -> None:
        self._ask = ask
        self._kept = kept
        self._remembered = remembered
        self._answers: OrderedDict[Hashable, Shared[T]] = OrderedDict()

    async def get(self, key: Hashable) -> Look[T]:
        """As `Shared.get`, of the question with this parameter."""
        shared = self._answers.get(key)
        if shared is None:
            shared = self._answers[key] = Shared(lambda: self._ask(key), self._kept)
            if len(self._answers) > self._remembered:
                self._answers.popitem(last=False)
        self._answers.move_to_end(key)
        return await shared.get()
