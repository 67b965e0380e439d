"""Where nothing runs in order or takes turns, a delivery writes as much to PostgreSQL's log as it did without lanes."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database.driver import bound_waits
from service.ledger import delivering
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from tests.proof.ledger.backlog import MANY, ROWS
from tests.servers.real_servers import TEMPLATE, another_postgres

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.database.driver import Connection
    from tests.servers.real_servers import Where

MINUTE = timedelta(minutes=1)

LOG = 1_950
"""Bytes that a delivery may write to the log in all, from `publish` to its completion."""


@pytest.fixture
async def alone(servers: Where, server_folder: Path) -> AsyncIterator[Connection]:
    """A PostgreSQL that writes nothing to its log but what it is asked to do."""
    settings = {"autovacuum": "off", "full_page_writes": "off", "wal_level": "replica", "checkpoint_timeout": "1h"}
    with another_postgres(servers, server_folder / "postgres", settings=settings) as postgres:
        connection = await asyncpg.connect(postgres.url(TEMPLATE))
        await bound_waits(connection)
        yield connection
        await connection.close()


async def test_a_delivery_without_order_writes_as_little_to_the_log(alone: Connection) -> None:
    before = await written(alone)
    await alone.execute(MANY, "pending")
    taken: list[UUID] = []
    while len(taken) < ROWS:
        async with alone.transaction():
            batch = await take_due(alone, "ledger", NO_FLOOR, 500, Pauses(MINUTE, MINUTE, MINUTE), expired_leases=True)
        assert batch is not None
        taken += [UUID(each.delivery_id) for each in batch.deliveries]
    for begin in range(0, ROWS, 50):
        asked = [(each, uuid4()) for each in taken[begin : begin + 50]]
        for claim in await delivering.claim_free(alone, asked, MINUTE):
            assert await delivering.complete(alone, claim)
    used = (await written(alone) - before) / ROWS
    assert used <= LOG
    for name in ("lane", "entering", "share"):
        assert await alone.fetchval(f"SELECT pg_relation_size('ix_outbox_message_{name}')") <= 8_192


async def written(connection: Connection) -> int:
    bytes_: int = await connection.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
    return bytes_
