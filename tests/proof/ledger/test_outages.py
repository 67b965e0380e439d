"""The broker or PostgreSQL gone for a while, with real workers and a relay: effects resume, once each."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio

from service.database.sessions import transaction
from service.outbox import Event, publish
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, all_dispatched, effects_once, is_state
from tests.proof.ledger.working import working
from tests.waiting import until

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

pytestmark = pytest.mark.slow


_FEW = {"OUTBOX__CONCURRENCY": "4"}
"""So few that slow deliveries keep a worker busy."""

A_FEW_SECONDS = 5
"""What the machine may take beyond T, when it is busy with other tests too."""


async def publish_all(ledger: Ledger, *events: Event) -> None:
    """Publish several events in one transaction."""
    async with transaction(ledger.sessions) as session:
        for event in events:
            publish(session, event)


def slow(count: int) -> list[Event]:
    """Events whose deliveries take a second each."""
    return [domain.Happened(subject_id=uuid4(), how="slow") for _ in range(count)]


def quick(count: int) -> list[Event]:
    """Events whose deliveries take no time."""
    return [domain.Happened(subject_id=uuid4()) for _ in range(count)]


async def clock(ledger: Ledger) -> datetime:
    """The database's time."""
    now: datetime = await ledger.connection.fetchval("SELECT clock_timestamp()")
    return now


async def test_a_flushed_broker_loses_nothing(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """What it has forgotten starts again within T and a few seconds, by the database's clock."""
    waiting = f"{settings.broker.namespace}:ledger"
    environment |= _FEW
    async with working(environment, settings, tmp_path), redis.asyncio.Redis.from_url(own_broker.url) as client:
        await publish_all(ledger, *slow(12), *quick(60))  # the slow ones keep the worker busy meanwhile
        await until(lambda: all_dispatched(ledger))
        assert await client.llen(waiting) > 30
        flushed_at = await clock(ledger)
        await client.flushall()
        await until(lambda: all_completed(ledger))
    await effects_once(ledger)
    lost = await ledger.connection.fetch(
        "SELECT attempts, started_at - $1 AS after FROM outbox_message WHERE dispatches > 1",
        flushed_at,
    )
    assert len(lost) > 30
    assert max(row["after"].total_seconds() for row in lost) < settings.outbox.redispatch_after + A_FEW_SECONDS
    assert {row["attempts"] for row in lost} == {1}


async def test_an_outage_of_the_broker_uses_up_nothing(
    ledger: Ledger, own_broker: Valkey, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """However long it lasts: longer than T and than a lease, nothing changes any more."""
    environment |= _FEW
    async with working(environment, settings, tmp_path):
        await publish_all(ledger, *slow(8), *quick(30))
        await until(lambda: all_dispatched(ledger))
        await asyncio.to_thread(own_broker.kill)
        killed_at = await clock(ledger)
        await publish_all(ledger, *quick(30))
        longest = timedelta(seconds=settings.outbox.redispatch_after + settings.outbox.lease)

        async def all_due_for_long() -> bool:
            state = "SELECT count(*) FROM outbox_message WHERE state <> 'completed' AND due_at > clock_timestamp()"
            return await clock(ledger) - killed_at > longest and not await ledger.connection.fetchval(state)

        await until(all_due_for_long)
        found = await ledger.connection.fetch(
            "SELECT state, max(dispatches) AS dispatches, max(attempts) AS attempts FROM outbox_message GROUP BY state"
        )
        assert {row["state"]: (row["dispatches"], row["attempts"]) for row in found} == {
            "completed": (1, 1),
            "dispatched": (1, 0),
            "pending": (0, 0),
        }
        await asyncio.to_thread(own_broker.start)
        back_at = await clock(ledger)
        await until(lambda: all_completed(ledger))
    await effects_once(ledger)
    found = await ledger.connection.fetch("SELECT attempts, dispatches, started_at FROM outbox_message")
    assert {row["attempts"] for row in found} == {1}
    assert {row["dispatches"] for row in found} == {1, 2}
    # Relay and worker look for the broker every five seconds at most.
    assert max(row["started_at"] for row in found) - back_at < timedelta(seconds=5 + A_FEW_SECONDS)


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
            await until(lambda each=message_id: is_state(ledger, each, "completed"))  # type: ignore[misc]

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
        await until(lambda: all_completed(own_ledger))
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
        await publish_all(own_ledger, *slow(8), *quick(30))
        await until(lambda: own_ledger.connection.fetchval("SELECT 1 FROM outbox_message WHERE state = 'running'"))
        await asyncio.to_thread(own_broker.kill)
        await asyncio.to_thread(own_postgres.stop)
        await until(lambda: worker.says("connection error"))
        await asyncio.sleep(2 * settings.outbox.lease)  # the fault itself
        await asyncio.to_thread(own_postgres.start)
        await asyncio.to_thread(own_broker.start)
        own_ledger.connection.terminate()
        own_ledger.connection = await asyncpg.connect(own_postgres.url("service"))
        await until(lambda: all_completed(own_ledger))
    await effects_once(own_ledger)
    assert await own_ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message") == 1
