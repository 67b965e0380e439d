"""The purge removes old completed rows and nothing else, one purger at a time, and waits for nobody."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from service.ledger.ids import new_event_id
from service.ledger.purging import Purged, purge_step_by_step

if TYPE_CHECKING:
    from service.database.driver import Connection

_WEEK = timedelta(days=7)

_INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, state, completed_at)
SELECT id, id, 'ledger.happened', 1, 'ledger.react', 'ledger', '{}', '{}', 'completed', now() - interval '8 days'
FROM unnest($1::uuid[]) AS new (id)
"""


async def _insert(connection: Connection, count: int, *, days: int = 8) -> None:
    """Rows that were completed 8 days ago, with ids that look as if they had been made so many days ago."""
    ids = [UUID(int=new_event_id().int - (days * 86_400_000 << 80)) for _ in range(count)]
    await connection.execute(_INSERT, ids)


async def test_the_purge_stops_at_younger_ids(connection: Connection) -> None:
    """A row's id is older than its completion, so young ids need not be looked at."""
    await _insert(connection, 10, days=0)
    looked = 0

    def count(_: int) -> None:
        nonlocal looked
        looked += 1

    purged = await purge_step_by_step(connection, _WEEK, page=1, progress=count)
    assert purged is not None
    assert (purged.deliveries, looked) == (0, 1)


async def test_the_purge_walks_in_small_transactions(connection: Connection) -> None:
    await _insert(connection, 25)
    steps: list[int] = []
    purged = await purge_step_by_step(connection, _WEEK, page=10, progress=steps.append)
    assert purged is not None
    assert (purged.deliveries, steps) == (25, [10, 20, 25, 25])
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert await connection.fetchval(held) == 0


async def test_a_second_purger_leaves_it_to_the_first(connection: Connection, database_url: str) -> None:
    await _insert(connection, 3)
    other = await asyncpg.connect(database_url)
    inside = asyncio.Event()
    first = asyncio.create_task(purge_step_by_step(other, _WEEK, page=1, progress=lambda _: inside.set()))
    await inside.wait()
    assert await purge_step_by_step(connection, _WEEK) is None
    purged = await first
    assert purged is not None
    assert purged.deliveries == 3
    await other.close()


async def test_a_locked_row_is_passed_over_and_its_owner_not_disturbed(
    connection: Connection, database_url: str
) -> None:
    await _insert(connection, 5)
    owner = await asyncpg.connect(database_url)
    async with owner.transaction():
        await owner.execute(
            "UPDATE outbox_message SET errors = '[1]' WHERE id = (SELECT max(id::text)::uuid FROM outbox_message)"
        )
        async with asyncio.timeout(60):
            assert await purge_step_by_step(connection, _WEEK) == Purged(4, 0)
        # Were they locked in different orders, this would be a deadlock.
        await owner.execute("UPDATE outbox_message SET errors = '[2]'")
    await owner.close()
    assert await purge_step_by_step(connection, _WEEK) == Purged(1, 0)


async def test_the_purge_and_writers_do_not_deadlock(connection: Connection, database_url: str) -> None:
    await _insert(connection, 150)
    writer = await asyncpg.connect(database_url)
    going = True

    async def write_backwards() -> None:
        while going:
            await writer.execute(
                "UPDATE outbox_message AS message SET errors = '[]' FROM"
                " (SELECT id FROM outbox_message ORDER BY id DESC FOR UPDATE) AS locked WHERE locked.id = message.id"
            )

    writing = asyncio.create_task(write_backwards())
    removed = 0
    async with asyncio.timeout(60):
        while removed < 150:
            purged = await purge_step_by_step(connection, _WEEK, page=7)
            assert purged is not None
            removed += purged.deliveries
    going = False
    await writing
    await writer.close()
    assert await connection.fetchval("SELECT count(*) FROM outbox_message") == 0


async def test_a_row_that_changed_meanwhile_is_looked_at_again(connection: Connection) -> None:
    """Nothing but `completed` is ever removed, even when the scan saw an older version."""
    await _insert(connection, 2)
    await connection.execute(
        "UPDATE outbox_message SET state = 'pending' WHERE id = (SELECT min(id::text)::uuid FROM outbox_message)"
    )
    assert await purge_step_by_step(connection, _WEEK) == Purged(1, 0)
    assert await connection.fetchval("SELECT state FROM outbox_message") == "pending"


async def test_old_http_idempotency_keys_go_too(connection: Connection) -> None:
    await connection.execute("DROP TABLE IF EXISTS idempotency_key")
    await purge_step_by_step(connection, _WEEK)
    await connection.execute("CREATE TABLE idempotency_key (key text PRIMARY KEY, created_at timestamptz NOT NULL)")
    await connection.execute(
        "INSERT INTO idempotency_key SELECT 'old ' || n, now() - interval '25 h' FROM generate_series(1, 25) AS n"
    )
    await connection.execute("INSERT INTO idempotency_key VALUES ('young', now() - interval '23 h')")
    purged = await purge_step_by_step(connection, _WEEK, page=10)
    assert purged is not None
    assert purged.idempotency_keys == 25
    assert await connection.fetchval("SELECT key FROM idempotency_key") == "young"
