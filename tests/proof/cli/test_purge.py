"""The purge removes old completed rows and nothing else, one purger at a time, and waits for nobody."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg
import pytest

from service.ledger.purging import Purged, purge_step_by_step

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.database.driver import Connection
    from tests.proof.cli.conftest import Outbox, Rows

_COUNT = "SELECT count(*) FROM outbox_message"
_OLD: dict[str, Any] = {"state": "'completed'", "completed_at": "now() - interval '8 days'"}
_WEEK = timedelta(days=7)


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def _age(rows: Rows, ids: list[UUID], days: int) -> None:
    """Let ids look as if they had been made so long ago."""
    for each in ids:
        older = UUID(int=each.int - (days * 86_400_000 << 80))
        rows.sql(f"UPDATE outbox_message SET id = '{older}' WHERE id = '{each}'")


def test_purge_removes_what_was_completed_before_the_setting(outbox: Outbox, rows: Rows) -> None:
    _age(rows, rows.message(3, **_OLD), 8)
    _age(rows, rows.message(1, state="'completed'", completed_at="now() - interval '6 days'"), 8)
    _age(rows, [*rows.message(), *rows.message(state="'running'"), *rows.message(state="'dispatched'")], 400)
    rows.message(1, state="'completed'", completed_at="now()")
    assert outbox("purge", "--dry-run").out == "3 completed rows would be removed; nothing was done.\n"
    assert rows.sql(_COUNT) == "8"
    ran = outbox("purge")
    assert (ran.code, ran.out) == (0, "Removed 3 completed rows and 0 HTTP idempotency keys.\n")
    assert rows.sql(_COUNT) == "5"
    assert outbox("purge", "--older-than", "5d", "--json").json["messages"] == 1
    assert outbox("purge", "--older-than", "0s").out.startswith("Removed 1 ")
    assert rows.sql("SELECT string_agg(state, ' ' ORDER BY state) FROM outbox_message") == "dispatched pending running"


@pytest.mark.parametrize("duration", ["7", "week", "-1d", "1e9d", "999999999d"])
def test_a_duration_that_makes_no_sense_is_refused(outbox: Outbox, rows: Rows, duration: str) -> None:
    ran = outbox("purge", f"--older-than={duration}")
    assert (ran.code, "is no duration" in ran.err) == (2, True)


async def test_the_purge_stops_at_younger_ids(rows: Rows, connection: Connection) -> None:
    """A row's id is older than its completion, so young ids need not be looked at."""
    rows.message(10, **_OLD)
    looked = 0

    def count(_: int) -> None:
        nonlocal looked
        looked += 1

    purged = await purge_step_by_step(connection, _WEEK, page=1, progress=count)
    assert purged is not None
    assert (purged.messages, looked) == (0, 1)


async def test_the_purge_walks_in_small_transactions(rows: Rows, connection: Connection) -> None:
    _age(rows, rows.message(25, **_OLD), 8)
    steps: list[int] = []
    purged = await purge_step_by_step(connection, _WEEK, page=10, progress=steps.append)
    assert purged is not None
    assert (purged.messages, steps) == (25, [10, 20, 25, 25])
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert await connection.fetchval(held) == 0


async def test_a_second_purger_leaves_it_to_the_first(rows: Rows, connection: Connection, database_url: str) -> None:
    _age(rows, rows.message(3, **_OLD), 8)
    other = await asyncpg.connect(database_url)
    inside = asyncio.Event()
    first = asyncio.create_task(purge_step_by_step(other, _WEEK, page=1, progress=lambda _: inside.set()))
    await inside.wait()
    assert await purge_step_by_step(connection, _WEEK) is None
    purged = await first
    assert purged is not None
    assert purged.messages == 3
    await other.close()


def test_the_command_says_that_another_is_at_work(outbox: Outbox, rows: Rows, database_url: str) -> None:
    async def while_held() -> tuple[int, str]:
        holder = await asyncpg.connect(database_url)
        await holder.execute(
            "SELECT pg_advisory_lock((x'6f757470'::bigint << 32) | 'outbox_message'::regclass::oid::bigint)"
        )
        ran = await asyncio.to_thread(outbox, "purge")
        await holder.close()
        return ran.code, ran.out

    assert asyncio.run(while_held()) == (0, "Another purge is at work; nothing to do here.\n")


async def test_a_locked_row_is_passed_over_and_its_owner_not_disturbed(
    rows: Rows, connection: Connection, database_url: str
) -> None:
    ids = rows.message(5, **_OLD)
    _age(rows, ids, 8)
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


async def test_the_purge_and_writers_do_not_deadlock(rows: Rows, connection: Connection, database_url: str) -> None:
    _age(rows, rows.message(150, **_OLD), 8)
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
            removed += purged.messages
    going = False
    await writing
    await writer.close()
    assert rows.sql(_COUNT) == "0"


async def test_a_row_that_changed_meanwhile_is_looked_at_again(rows: Rows, connection: Connection) -> None:
    """Nothing but `completed` is ever removed, even when the scan saw an older version."""
    _age(rows, rows.message(2, **_OLD), 8)
    rows.sql("UPDATE outbox_message SET state = 'pending' WHERE id = (SELECT min(id::text)::uuid FROM outbox_message)")
    assert await purge_step_by_step(connection, _WEEK) == Purged(1, 0)
    assert rows.sql("SELECT state FROM outbox_message") == "pending"


async def test_old_http_idempotency_keys_go_too(rows: Rows, connection: Connection) -> None:
    rows.sql("DROP TABLE IF EXISTS idempotency_key")
    await purge_step_by_step(connection, _WEEK)
    rows.sql("CREATE TABLE idempotency_key (key text PRIMARY KEY, created_at timestamptz NOT NULL)")
    rows.sql("INSERT INTO idempotency_key SELECT 'old ' || n, now() - interval '25 h' FROM generate_series(1, 25) AS n")
    rows.sql("INSERT INTO idempotency_key VALUES ('young', now() - interval '23 h')")
    purged = await purge_step_by_step(connection, _WEEK, page=10)
    assert purged is not None
    assert purged.idempotency_keys == 25
    assert rows.sql("SELECT key FROM idempotency_key") == "young"
