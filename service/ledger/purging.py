"""Forgetting what was completed long ago.

Ids are in the order of time, so the oldest rows stand at the left of the primary key: the purge walks it from there
with a cursor, a page and a short transaction at a time, and needs no index on `completed_at`.

What must stay true: only completed rows go, and by PostgreSQL's clock; one purger works at a time; and it deadlocks
with nobody, since it takes rows in order and passes over those that somebody has locked.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from service.ledger.ids import first_id_after

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.database.driver import Connection

_PAGE = 2_000
"""Rows looked at in one transaction."""

_CLOCKS_DIFFER = timedelta(hours=1)
"""How far the clock that made an id may run ahead of PostgreSQL's."""

KEEP_HTTP_KEYS = timedelta(hours=24)
"""How long a client may repeat a request under its `Idempotency-Key`, where the service does not say otherwise."""

# Derived from the table's oid, like the relay's gate, so that several ledgers in one database have a purger each.
_KEY = "(x'6f757470'::bigint << 32) | 'outbox_message'::regclass::oid::bigint"
_LOCK = f"SELECT pg_try_advisory_lock({_KEY})"
_UNLOCK = f"SELECT pg_advisory_unlock({_KEY})"

_PURGE = """
WITH page AS MATERIALIZED (
    SELECT id, state, completed_at FROM outbox_message WHERE id > $1 AND id < $2 ORDER BY id LIMIT $4
), old AS (
    SELECT message.id FROM outbox_message AS message JOIN page ON page.id = message.id
    WHERE message.state = 'completed' AND message.completed_at < $3
    ORDER BY message.id FOR UPDATE OF message SKIP LOCKED
), gone AS (
    DELETE FROM outbox_message USING old WHERE outbox_message.id = old.id RETURNING outbox_message.id
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last, (SELECT count(*) FROM gone) AS count
"""
_COUNT = """
WITH page AS MATERIALIZED (
    SELECT id, state, completed_at FROM outbox_message WHERE id > $1 AND id < $2 ORDER BY id LIMIT $4
)
SELECT (SELECT id FROM page ORDER BY id DESC LIMIT 1) AS last,
       (SELECT count(*) FROM page WHERE state = 'completed' AND completed_at < $3) AS count
"""
# The table is not the ledger's, but needs the same: one purger at a time, in a role that may delete.
_HTTP_KEYS = """
DELETE FROM idempotency_key WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM idempotency_key WHERE created_at < clock_timestamp() - $1::interval LIMIT $2
    FOR UPDATE SKIP LOCKED))
"""


@dataclass(frozen=True, slots=True)
class Purged:
    """What was removed, or would be."""

    deliveries: int
    idempotency_keys: int


async def purge_step_by_step(
    connection: Connection,
    keep: timedelta,
    keep_http_keys: timedelta = KEEP_HTTP_KEYS,
    *,
    dry_run: bool = False,
    page: int = _PAGE,
    progress: Callable[[int], None] = lambda _: None,
) -> Purged | None:
    """Remove deliveries completed before that; `None` when another purger is at work.

    Args:
        connection: One of its own, in session mode and outside a transaction: it holds an advisory lock meanwhile.
        keep: How long ago they were completed at least.
        keep_http_keys: How long ago an HTTP idempotency key was used first at least.
        dry_run: Only count them.
        page: Rows looked at in one transaction.
        progress: Told after each of them how many deliveries are removed.
    """
    if not await connection.fetchval(_LOCK):
        return None
    try:
        deliveries = await _purge_deliveries(connection, keep, _COUNT if dry_run else _PURGE, page, progress)
        keys = 0 if dry_run else await _purge_http_keys(connection, keep_http_keys, page)
    finally:
        if not connection.is_closed():
            await connection.execute(_UNLOCK)
    return Purged(deliveries, keys)


async def _purge_deliveries(
    connection: Connection, keep: timedelta, statement: str, page: int, progress: Callable[[int], None]
) -> int:
    before: datetime = await connection.fetchval("SELECT clock_timestamp() - $1::interval", keep)
    clock = asyncio.get_running_loop().time
    cursor: UUID | None = UUID(int=0)
    end = first_id_after(before + _CLOCKS_DIFFER)
    removed = 0
    while cursor is not None:
        began = clock()
        row = await connection.fetchrow(statement, cursor, end, before, page)
        assert row is not None
        cursor = row["last"]
        removed += row["count"]
        progress(removed)
        # Leaves most of the processor and the disk to others.
        await asyncio.sleep(min(3 * (clock() - began), 1))
    return removed


async def _purge_http_keys(connection: Connection, keep: timedelta, page: int) -> int:
    """Remove the HTTP idempotency keys that nobody can use any more, where the service has that table."""
    if await connection.fetchval("SELECT to_regclass('idempotency_key')") is None:
        return 0
    removed = 0
    while True:
        status = await connection.execute(_HTTP_KEYS, keep, page)
        count = int(status.rpartition(" ")[2])
        removed += count
        if count < page:
            return removed
