"""Sleeping until there is something to do, without slowing the writers down.

A trigger that always notifies takes PostgreSQL's database-wide notification lock in every commit. So writers notify
only a sleeping relay: it holds the exclusive advisory lock `outbox_gate()`, and a writer that gets the shared lock
instead holds it until its transaction ends. What must stay true:

- The lock and LISTEN are on one session, and the lock is only ever tried for: a session that waits for it would not be
  told of notifications and would hold back vacuum.
- After the lock is granted, a look in a new statement comes before the sleep; whoever wrote without notifying had
  committed by then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.database.driver import Connection

LONGEST_SLEEP = 15.0
"""Seconds. A lease or a pause may have begun since the relay looked."""

SHORTEST_SLEEP = 0.05
"""Seconds between looks while a writer's long transaction keeps this relay from falling asleep."""

_FIRST_LOOK = 0.002
"""Seconds until the first of these looks, each pause being twice the one before: most transactions end at once."""

_STANDBY = 2.0
"""Seconds between looks of a relay beside another one that sleeps and is told of everything."""

_PATIENCE = (5.0, 2.0)
"""Seconds that each of the proofs at the start may take."""

_ANSWER = 5.0
"""Seconds until a session that is well has answered."""

_TRY = """
SELECT pg_try_advisory_lock(outbox_gate()) AS granted,
       EXISTS (
           SELECT FROM pg_locks
           WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted AND pid <> pg_backend_pid()
             AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
             AND (classid::bigint << 32 | objid::bigint) = outbox_gate()
       ) AS standby
"""


class Wakeup:
    """Sleeps on one connection, which it shares with nobody while it sleeps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._notified = asyncio.Event()
        self._ended = False
        self._payloads: list[object] = []
        self._kept_awake = 0

    async def open(self, notifier: Connection) -> None:
        """Listen, and prove it: a relay behind a pooler in transaction mode would never be told of anything.

        Args:
            notifier: Another connection made in the same way. What a session notifies itself of comes with the reply
                and would get through any pooler.

        Raises:
            ConfigurationError: when this session is well and, idle, does not receive the other's notification.
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError: when one of them ends or does not answer.
        """
        await self._connection.add_listener("outbox", self._on_notify)
        for patience in _PATIENCE:
            if await self._is_told(notifier, patience):
                return
            # PostgreSQL may have stood still meanwhile; then the answer takes its time, or the next proof succeeds.
            await self._connection.execute("SELECT 1", timeout=_ANSWER)
        raise ConfigurationError(
            "DATABASE__URL: the relay is not told of notifications; give it a direct connection or a pooler in "
            "session mode (PgBouncer in transaction mode swallows them)"
        )

    async def _is_told(self, notifier: Connection, seconds: float) -> bool:
        """Whether this session, asking nothing, receives what the other notifies it of."""
        token = str(uuid4())
        await notifier.execute("SELECT pg_notify('outbox', $1)", token, timeout=_ANSWER)
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        while token not in self._payloads:
            if self._connection.is_closed():
                raise ConnectionResetError("the connection ended before a notification came")
            if clock() >= deadline:
                return False
            self._notified.clear()
            await self._wait(deadline - clock())
        self._payloads.clear()
        return True

    def _on_notify(self, _connection: Any, _pid: int, _channel: str, payload: object) -> None:
        if payload:
            self._payloads.append(payload)
        self._notified.set()

    def interrupt(self) -> None:
        """End this sleep; there is something new to do."""
        self._notified.set()

    def end(self) -> None:
        """End this sleep and every later one."""
        self._ended = True
        self._notified.set()

    async def sleep(
        self, look: Callable[[], Awaitable[float]], longest: float, shortest: float = SHORTEST_SLEEP
    ) -> bool:
        """Return when there may be something to do; whether somebody rang.

        Args:
            look: Seconds until the next row is due, 0 or less if one is; asked after the lock was granted.
            longest: Seconds to sleep at most.
            shortest: Seconds to sleep at least, unless there is something to do at once or somebody rings.
        """
        self._notified.clear()
        if self._ended:
            return False
        row = await self._connection.fetchrow(_TRY)
        assert row is not None
        if not row["granted"]:
            pause = min(_FIRST_LOOK * 2 ** min(self._kept_awake, 10), SHORTEST_SLEEP)
            self._kept_awake += 1
            await self._wait(_STANDBY if row["standby"] else pause)
            return self._notified.is_set()
        self._kept_awake = 0
        try:
            due_in = await look()
            if due_in > 0:
                await self._wait(min(max(due_in, shortest), longest))
        finally:
            if not self._connection.is_closed():
                await self._connection.execute("SELECT pg_advisory_unlock_all()")
        return self._notified.is_set()

    async def _wait(self, seconds: float) -> None:
        closed = asyncio.get_running_loop().create_future()

        def on_close(_: Any) -> None:
            if not closed.done():
                closed.set_result(None)

        self._connection.add_termination_listener(on_close)
        notified = asyncio.ensure_future(self._notified.wait())
        try:
            await asyncio.wait((notified, closed), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            notified.cancel()
            self._connection.remove_termination_listener(on_close)
