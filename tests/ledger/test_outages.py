"""The broker or PostgreSQL gone for a while, with real workers and a relay: effects resume, once each."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio

from service.database import create_engine, session_factory
from tests.ledger import domain
from tests.ledger.conftest import Ledger
from tests.ledger.test_worker import all_completed, is_state, working
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings


@pytest.fixture
def own_broker(settings: Settings, environment: dict[str, str], own_valkey: Valkey) -> Valkey:
    """A Valkey of this test's own, for relay and workers."""
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    environment["BROKER__URL"] = own_valkey.url
    return own_valkey


@pytest.fixture
async def own_ledger(settings: Settings, environment: dict[str, str], own_postgres: Postgres) -> AsyncIterator[Ledger]:
    """The ledger in a PostgreSQL of this test's own, for relay and workers."""
    url = own_postgres.url("service")
    settings.database.url = type(settings.database.url)(url)
    environment["DATABASE__URL"] = url
    engine = create_engine(settings.database, application_name="tests")
    connection = await asyncpg.connect(url)
    await connection.execute(domain.SCHEMA)
    ledger = Ledger(connection, session_factory(engine))
    yield ledger
    ledger.connection.terminate()  # a test may have replaced it
    await engine.dispose()


async def effects_once(ledger: Ledger) -> None:
    """Every completed row has one effect."""
    odd = await ledger.connection.fetch(
        """SELECT id, count(effect) FROM outbox_message LEFT JOIN effect ON message_id = id
           WHERE state = 'completed' GROUP BY id HAVING count(effect) <> 1"""
    )
    assert odd == []


async def test_a_flushed_broker_loses_nothing(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path), redis.asyncio.Redis.from_url(own_broker.url) as client:
        for round_ in range(3):
            for _ in range(30):
                await ledger.publish(domain.Happened(subject_id=uuid4(), how="slow" if round_ == 1 else ""))
            await client.flushall()
        await until(lambda: all_completed(ledger), timeout=40)
    await effects_once(ledger)


async def test_a_restarted_broker_without_persistence_loses_nothing(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path):
        for _ in range(30):
            await ledger.publish()
        await asyncio.to_thread(own_broker.kill)
        for _ in range(30):
            await ledger.publish()
        await asyncio.to_thread(own_broker.start)
        await until(lambda: all_completed(ledger), timeout=40)
    await effects_once(ledger)
    burned = await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE attempts > 1")
    assert burned == 0


async def test_a_stall_of_seven_seconds_strands_nothing(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Longer than redis-py's own timeout: what the server fetched for a client that gave up would lie in the acks."""
    settings.outbox.redispatch_after = 600
    async with working(environment, settings, tmp_path), redis.asyncio.Redis.from_url(own_broker.url) as client:
        (first,) = await ledger.publish()
        await until(lambda: is_state(ledger, first, "completed"))
        pid = own_broker.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        try:
            ids = [await ledger.publish() for _ in range(20)]
            await asyncio.sleep(7)  # the fault itself
        finally:
            os.kill(pid, signal.SIGCONT)
        for (message_id,) in ids:
            await until(lambda each=message_id: is_state(ledger, each, "completed"), timeout=20)  # type: ignore[misc]

        async def nothing_left() -> bool:
            keys = [key async for key in client.scan_iter(match="*__acks__*")]
            return not keys and not await client.exists(f"{settings.broker.namespace}:ledger.msgs")

        await until(nothing_left)
    await effects_once(ledger)


async def test_an_immediate_restart_of_postgres_uses_up_no_attempts(
    own_ledger: Ledger,
    own_postgres: Postgres,
    environment: dict[str, str],
    settings: Settings,
    tmp_path: Path,
) -> None:
    async with working(environment, settings, tmp_path):
        ids = [(await own_ledger.publish(domain.Happened(subject_id=uuid4(), how="slow")))[0] for _ in range(8)]
        await until(lambda: is_state(own_ledger, ids[0], "running"))
        await asyncio.to_thread(own_postgres.restart, mode="immediate")
        own_ledger.connection.terminate()
        own_ledger.connection = await asyncpg.connect(own_postgres.url("service"))
        await until(lambda: all_completed(own_ledger), timeout=40)
    await effects_once(own_ledger)
    burned = await own_ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message")
    assert burned == 1


async def test_postgres_and_the_broker_away_together(
    own_ledger: Ledger,
    own_postgres: Postgres,
    own_broker: Valkey,
    environment: dict[str, str],
    settings: Settings,
    tmp_path: Path,
) -> None:
    async with working(environment, settings, tmp_path) as worker:
        for _ in range(30):
            await own_ledger.publish()
        await asyncio.to_thread(own_broker.kill)
        await asyncio.to_thread(own_postgres.stop, mode="immediate")
        await until(lambda: worker.says("connection error"), timeout=20)
        await asyncio.to_thread(own_postgres.start)
        await asyncio.to_thread(own_broker.start)
        own_ledger.connection.terminate()
        own_ledger.connection = await asyncpg.connect(own_postgres.url("service"))
        await until(lambda: all_completed(own_ledger), timeout=40)
    await effects_once(own_ledger)
