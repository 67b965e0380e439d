"""Faults that the scenarios found, each pinned down where it can be seen at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg

from service.outbox.failures import lost_database
from service.outbox.heartbeat import Heartbeat
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

BROKEN = asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")


async def test_a_heartbeat_outlives_a_connection_that_breaks_while_it_is_used(database_url: str) -> None:
    attempts: Iterator[int] = iter(range(100))
    connected = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def connect() -> asyncpg.Connection[asyncpg.Record]:
        if next(attempts) == 0:
            raise BROKEN
        connection = await asyncpg.connect(database_url)
        loop.call_soon_threadsafe(connected.set)
        return connection

    heartbeat = Heartbeat(connect, timedelta(seconds=0.3))
    heartbeat.watch(uuid4(), uuid4(), timedelta(seconds=60))
    heartbeat.start()
    try:
        await until(connected.is_set, what="a second connection")
        assert heartbeat.is_alive()
    finally:
        await asyncio.to_thread(heartbeat.stop)


def test_a_connection_that_breaks_while_it_is_used_counts_as_an_outage() -> None:
    assert lost_database(BROKEN)
