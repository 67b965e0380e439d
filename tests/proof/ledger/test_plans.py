"""A young table grows faster than PostgreSQL's statistics: no statement may read all of it that was small."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg
import pytest
from pydantic import SecretStr

from relay.brokers.redis_sender import RedisSender
from service.outbox.running.runner import Runner
from tests.proof.ledger.backlog import MANY, ROWS
from tests.servers.real_servers import TEMPLATE
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.driver import Connection
    from service.dev.postgres import Postgres
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

READ_FROM_INDEX = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'ix_outbox_message_due'"
READ_BY_WORKERS = """
SELECT (SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'outbox_message')
       + (SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'outbox_message')
"""


@pytest.fixture
def alone(settings: Settings, own_postgres: Postgres) -> Settings:
    """The test's settings, with a PostgreSQL of its own: a transaction of another test keeps dead entries alive."""
    database = settings.database.model_copy(update={"url": SecretStr(own_postgres.url(TEMPLATE))})
    return settings.model_copy(update={"database": database})


async def test_the_relay_reads_each_row_of_a_backlog_about_once(alone: Settings) -> None:
    connection = await asyncpg.connect(alone.database.dsn)
    await connection.execute(MANY, "pending")
    await drained(alone)
    read = await until(lambda: reported(connection), what="the statistics of the relay's session")
    await connection.close()
    assert read < 3 * ROWS


async def test_the_relay_does_not_crawl_over_what_it_has_handed_over(
    ledger: Ledger, settings: Settings, connect: Connect
) -> None:
    """A transaction anywhere in the database keeps the index entries of all rows that were handed over."""
    await ledger.connection.execute(MANY, "pending")
    other = await connect()
    async with other.transaction(isolation="repeatable_read"):
        await other.execute("SELECT FROM outbox_message LIMIT 1")
        await drained(settings, batch_size=100)
        read = await until(lambda: reported(ledger.connection), what="the statistics of the relay's session")
    assert read < 20 * ROWS


async def drained(settings: Settings, **options: int) -> None:
    """Let a relay hand all rows over; seen from the broker, because a look into the ledger would count as reading."""
    patient = settings.outbox.model_copy(update={"high_water_mark": 2 * ROWS, "redispatch_after": 600} | options)
    sender = RedisSender(settings.broker)

    async def all_waiting() -> bool:
        return await sender.depth("ledger") == ROWS

    async with relaying(settings.model_copy(update={"outbox": patient}), sender):
        await until(all_waiting)


async def reported(connection: Connection) -> int:
    read: int = await connection.fetchval(READ_FROM_INDEX)
    return read if read >= ROWS else 0


@pytest.mark.parametrize("rows", [0, 10])
async def test_a_worker_reads_only_its_own_rows_after_a_burst(
    ledger: Ledger, settings: Settings, worker_engine: AsyncEngine, rows: int
) -> None:
    """Plans that are kept since the table had so few rows."""
    runner = Runner(settings, worker_engine)
    await runner.open()
    few = [await ledger.happen() for _ in range(10)]
    if not rows:
        await ledger.connection.execute("CREATE TABLE aside AS TABLE outbox_message")
        await ledger.connection.execute("DELETE FROM outbox_message")
    await ledger.connection.execute("VACUUM ANALYZE outbox_message")
    if not rows:
        await ledger.connection.execute("INSERT INTO outbox_message TABLE aside")
    for message_id in few:
        await deliver(ledger, runner, message_id)
    grown = await ledger.connection.fetch(MANY, "dispatched")
    before = await ledger.connection.fetchval(READ_BY_WORKERS)
    for row in grown[:10]:
        await runner.deliver(row["id"])  # the test's own look-ups would count as reading
    await runner.close()
    await worker_engine.dispose()
    await until(lambda: flushed(ledger), what="the statistics of the runner's sessions")
    assert await ledger.connection.fetchval(READ_BY_WORKERS) - before < ROWS
    assert [await ledger.state(row["id"]) for row in grown[:10]] == ["completed"] * 10


async def deliver(ledger: Ledger, runner: Runner, message_id: UUID) -> None:
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"


async def flushed(ledger: Ledger) -> bool:
    """Whether PostgreSQL has counted the look-ups of the sessions that ended."""
    sessions: int = await ledger.connection.fetchval(
        """SELECT count(*) FROM pg_stat_activity
           WHERE datname = current_database() AND application_name LIKE 'outbox-worker%'"""
    )
    return sessions == 0
