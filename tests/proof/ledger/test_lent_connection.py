"""asyncpg's connection, as it is lent: what whoever has it cannot do, and what never goes back to the pool.

What it has in common with a session is in `test_delivery.py`, `test_fencing.py` and `test_lost_database.py`.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from service.database.driver import has_transaction_timeout
from service.database.engine import create_engine
from service.database.lent_connection import LentConnection, lend_connection
from service.errors import DeliveryError, TransactionError
from service.outbox.running.runner import Runner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.outbox.running.runner import Run
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


@pytest.fixture
async def one(settings: Settings, ledger: Ledger) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection, on a database with the table `mark`."""
    await ledger.connection.execute("CREATE TABLE mark (number int)")
    settings.database.pool_size = 1
    engine = create_engine(settings.database, application_name="lent")
    yield engine
    await engine.dispose()


def lend(engine: AsyncEngine) -> AbstractAsyncContextManager[LentConnection]:
    """In a transaction with a mark of its own."""
    mark = str(uuid4())
    return lend_connection(engine, mark, lambda _: f"SET LOCAL outbox.transaction = '{mark}'")


async def marks(ledger: Ledger) -> list[int]:
    """What is committed."""
    return [row["number"] for row in await ledger.connection.fetch("SELECT number FROM mark ORDER BY number")]


async def test_it_runs_sql_in_one_transaction(one: AsyncEngine, ledger: Ledger) -> None:
    async with lend(one) as lent:
        assert await lent.execute("INSERT INTO mark VALUES ($1)", 1) == "INSERT 0 1"
        await lent.executemany("INSERT INTO mark VALUES ($1)", [(2,), (3,)])
        await lent.copy_records_to_table("mark", records=[(4,)], columns=["number"])
        assert [row["number"] for row in await lent.fetch("SELECT number FROM mark")] == [1, 2, 3, 4]
        assert await lent.fetchrow("SELECT number FROM mark WHERE number > $1", 4) is None
        assert await lent.fetchval("SELECT count(*) FROM mark") == 4
        assert await marks(ledger) == []
    assert await marks(ledger) == [1, 2, 3, 4]


async def test_what_a_savepoint_undoes_is_not_the_rest(one: AsyncEngine, ledger: Ledger) -> None:
    async with lend(one) as lent:
        await lent.execute("INSERT INTO mark VALUES (1)")
        with suppress(asyncpg.DivisionByZeroError):
            async with lent.transaction():
                await lent.execute("INSERT INTO mark VALUES (2)")
                await lent.execute("SELECT 1 / 0")
        async with lent.transaction():
            await lent.execute("INSERT INTO mark VALUES (3)")
    assert await marks(ledger) == [1, 3]


async def test_an_error_that_is_swallowed_commits_nothing(one: AsyncEngine, ledger: Ledger) -> None:
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        async with lend(one) as lent:
            await lent.execute("INSERT INTO mark VALUES (1)")
            with suppress(asyncpg.DivisionByZeroError):
                await lent.execute("SELECT 1 / 0")
    assert await marks(ledger) == []


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", " end", "/* now */ ABORT", "PREPARE TRANSACTION 'x'"])
async def test_no_method_takes_a_statement_that_ends_it(one: AsyncEngine, ledger: Ledger, end: str) -> None:
    async with lend(one) as lent:
        await lent.execute("INSERT INTO mark VALUES (1)")
        for call in (lent.execute, lent.fetch, lent.fetchrow, lent.fetchval):
            with pytest.raises(TransactionError, match="may not end the transaction"):
                await call(end)
        with pytest.raises(TransactionError, match="may not end the transaction"):
            await lent.executemany(end, [()])
        assert await marks(ledger) == []
    assert await marks(ledger) == [1]


async def test_once_it_was_ended_all_the_same_nothing_goes_through(one: AsyncEngine, ledger: Ledger) -> None:
    """What came after would be committed at once, each statement for itself."""
    with pytest.raises(TransactionError, match="committed or rolled back inside its block"):
        async with lend(one) as lent:
            with pytest.raises(TransactionError):
                await lent.execute("SELECT 1; ROLLBACK")
            await lent.execute("INSERT INTO mark VALUES (1)")
    assert await marks(ledger) == []


async def test_after_the_block_it_is_of_no_use(one: AsyncEngine, ledger: Ledger) -> None:
    """By then its connection may serve another."""
    async with lend(one) as first:
        pass
    uses = (lambda: first.execute("INSERT INTO mark VALUES (1)"), lambda: first.fetch("SELECT 1"), lambda: begin(first))
    for use in uses:
        with pytest.raises(TransactionError):
            await use()
    async with lend(one):
        for use in uses:
            with pytest.raises(TransactionError):
                await use()
    assert await marks(ledger) == []


async def begin(lent: LentConnection) -> None:
    async with lent.transaction():
        pass


async def test_one_that_is_in_use_at_the_end_is_given_up(one: AsyncEngine, ledger: Ledger) -> None:
    async with lend(one) as lent:
        before = await lent.fetchval("SELECT pg_backend_pid()")
    with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
        async with lend(one) as lent:
            await lent.execute("INSERT INTO mark VALUES (1)")
            left = asyncio.create_task(lent.fetch("SELECT pg_sleep(60)"))
            await asyncio.sleep(0)
    with pytest.raises(asyncpg.PostgresConnectionError):
        await left
    async with lend(one) as lent:
        assert await lent.fetchval("SELECT pg_backend_pid()") != before
    assert await marks(ledger) == []


async def test_a_statement_that_was_cancelled_leaves_nothing_behind(one: AsyncEngine, ledger: Ledger) -> None:
    with pytest.raises(TimeoutError):
        async with lend(one) as lent:
            await lent.execute("INSERT INTO mark VALUES (1)")
            async with asyncio.timeout(0.05):
                await lent.fetch("SELECT pg_sleep(60)")
    async with asyncio.timeout(30), lend(one) as lent:
        await lent.execute("INSERT INTO mark VALUES (2)")
    assert await marks(ledger) == [2]


async def test_a_block_that_raises_costs_no_connection(one: AsyncEngine, ledger: Ledger) -> None:
    pids = set()
    for _ in range(2):
        with pytest.raises(LookupError):
            async with lend(one) as lent:
                pids.add(await lent.fetchval("SELECT pg_backend_pid()"))
                await lent.execute("INSERT INTO mark VALUES (1)")
                raise LookupError
    assert len(pids) == 1
    assert await marks(ledger) == []


async def test_a_session_finds_its_connection_as_it_should_be(one: AsyncEngine) -> None:
    for _ in range(2):
        async with lend(one) as lent:
            pid = await lent.fetchval("SELECT pg_backend_pid()")
        async with one.begin() as connection:
            assert await connection.scalar(text("SELECT pg_backend_pid()")) == pid
            assert not await connection.scalar(text("SELECT current_setting('outbox.transaction', true)"))


async def test_another_engines_connections_are_not_lent(settings: Settings, ledger: Ledger) -> None:
    engine = create_async_engine(settings.database.dsn.replace("postgresql://", "postgresql+asyncpg://", 1))
    try:
        with pytest.raises(TransactionError, match="make it by `create_engine`"):
            async with lend(engine):
                raise AssertionError
        assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        await engine.dispose()


async def claimed(ledger: Ledger, runner: Runner) -> Run:
    run = await runner.claim(await ledger.happen())
    assert run is not None
    return run


@pytest.mark.parametrize("first", ["begin", "connection"])
@pytest.mark.parametrize("second", ["begin", "connection"])
async def test_a_delivery_has_one_transaction(ledger: Ledger, runner: Runner, first: str, second: str) -> None:
    run = await claimed(ledger, runner)
    async with getattr(run.delivery, first)():
        with pytest.raises(DeliveryError, match="one block"):
            getattr(run.delivery, second)()
    with pytest.raises(DeliveryError, match="one block"):
        getattr(run.delivery, second)()
    assert await ledger.state(run.claim.id) == "completed"


async def test_a_read_goes_with_it(ledger: Ledger, runner: Runner) -> None:
    run = await claimed(ledger, runner)
    async with run.delivery.connection() as lent, run.delivery.read() as session:
        assert await session.scalar(text("SELECT 1")) == await lent.fetchval("SELECT 1")
    assert await ledger.state(run.claim.id) == "completed"


async def test_an_event_from_sql_goes_with_it(ledger: Ledger, runner: Runner) -> None:
    run = await claimed(ledger, runner)
    count = "SELECT count(*) FROM outbox_message WHERE event_type = 'ledger.fanned_out'"
    async with run.delivery.connection() as lent:
        await lent.execute("SELECT outbox_publish($1, $2, queue => 'ledger')", "ledger.fanned_out", "{}")
        assert await ledger.connection.fetchval(count) == 0
    assert await ledger.connection.fetchval(count) == 1


async def test_the_transaction_is_bounded(ledger: Ledger, runner: Runner, settings: Settings) -> None:
    settings.outbox.time_limit, settings.outbox.grace = 3_000, 2
    run = await claimed(ledger, runner)
    whole = "transaction_timeout" if has_transaction_timeout(ledger.connection) else "statement_timeout"
    async with run.delivery.connection() as lent:
        assert await lent.fetchval(f"SHOW {whole}") == "5s"
        assert await lent.fetchval("SHOW idle_in_transaction_session_timeout") == "5s"
        assert await lent.fetchval("SHOW transaction_isolation") == "read committed"


async def test_a_rows_values_are_not_stored(ledger: Ledger, runner: Runner) -> None:
    """As `test_failures.py` has it for a session's errors."""
    message_id = await ledger.happen("conflict", raw=True)
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    (error,) = json.loads(row["errors"])
    assert "duplicate key" in error["message"]
    assert "ada" not in row["errors"]


async def test_more_runs_than_connections_stand_in_line(settings: Settings, ledger: Ledger) -> None:
    """In the worker's line, where it counts against no time limit, and not in the pool's."""
    settings.database.pool_size, settings.database.pool_timeout = 1, 0.001
    engine = create_engine(settings.database, application_name="outbox-worker")
    runner = Runner(settings, engine)
    await runner.open()
    try:
        ids = [await ledger.happen(raw=number % 3 > 0) for number in range(12)]
        await asyncio.gather(*(runner.deliver(each) for each in ids))
    finally:
        await runner.close()
        await engine.dispose()
    assert [await ledger.effects(each) for each in ids] == [1] * 12
    assert runner.connections.timeouts == 0
