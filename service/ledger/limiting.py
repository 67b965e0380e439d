"""Limiting queues: a row in `limited_queue` says how many deliveries may run at once, and how many start in a second.

What keeps the limit is in `limited_dispatching.py`. Each change is recorded in the same transaction (`operations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.ledger import operations
from service.text import storable

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from service.database.driver import Connection

# A relay that does not know of the limit yet may be handing over. It has read the table, so this waits for it.
_WAIT_FOR_HAND_OVERS = "LOCK TABLE limited_queue IN ACCESS EXCLUSIVE MODE"

# What is in flight is counted anew: it was not kept before, or not all of it. A sleeping relay is woken to see it.
_LIMIT = """
INSERT INTO limited_queue (queue, concurrency, per_second, burst, limited_by, why) VALUES ($1, $2, $3, $4, $5, $6)
ON CONFLICT (queue) DO UPDATE SET
    concurrency = excluded.concurrency, per_second = excluded.per_second, burst = excluded.burst,
    limited_at = excluded.limited_at, limited_by = excluded.limited_by, why = excluded.why,
    waiting = NULL, running = NULL
RETURNING outbox_wake()
"""
_UNLIMIT = "DELETE FROM limited_queue WHERE queue = $1 RETURNING outbox_wake()"
_LIMITED = """
SELECT queue, concurrency, per_second, burst, limited_at, clock_timestamp() - limited_at AS age, limited_by, why
FROM limited_queue ORDER BY queue
"""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limited queue: `concurrency` at once, `per_second` and `burst` of them at a time, or both; `None` is any."""

    queue: str
    concurrency: int | None
    per_second: float | None
    burst: int | None
    limited_at: datetime
    age: timedelta
    limited_by: str
    why: str | None


async def limit(
    connection: Connection,
    queue: str,
    concurrency: int | None,
    per_second: float | None,
    burst: int | None,
    *,
    by: str,
    why: str | None,
) -> None:
    """Limit a queue, or change its limit: no hand-over that begins after this goes beyond it.

    Raises:
        asyncpg.LockNotAvailableError: when a hand-over that is under way does not end within seconds.
    """
    words = storable(by), None if why is None else storable(why)
    async with connection.transaction():
        # Every relay and worker waits behind this.
        await connection.execute("SET LOCAL lock_timeout = '3s'")
        await connection.execute(_WAIT_FOR_HAND_OVERS)
        await connection.execute(_LIMIT, queue, concurrency, per_second, burst, *words)
        given = {"concurrency": concurrency, "per_second": per_second, "burst": burst}
        about = {"queue": queue} | {name: number for name, number in given.items() if number is not None}
        await operations.record(connection, "limit", about, by=by, why=why)


async def unlimit(connection: Connection, queue: str, *, by: str, why: str | None) -> bool:
    """Remove a queue's limit; whether there was one."""
    async with connection.transaction():
        changed = await connection.fetchrow(_UNLIMIT, queue) is not None
        if changed:
            await operations.record(connection, "unlimit", {"queue": queue}, by=by, why=why)
    return changed


async def limited_queues(connection: Connection) -> list[Limit]:
    """Every limit, by queue."""
    return [Limit(**row) for row in await connection.fetch(_LIMITED)]
