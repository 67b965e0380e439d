"""Deploys and stops under load, and one service handing events to another."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database import create_engine, session_factory, transaction
from service.outbox import Delivery, Event, accept, consumer
from service.outbox.runner import Runner
from tests.ledger import domain
from tests.ledger.conftest import Ledger
from tests.ledger.test_outages import effects_once
from tests.ledger.test_worker import Worker, all_completed, is_state, working
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.database import SessionFactory
    from service.settings import Settings


async def test_a_rolling_restart_under_load_uses_up_no_attempts(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path) as first:
        for number in range(60):
            await ledger.publish(domain.Happened(subject_id=uuid4(), how="slow" if number % 3 == 0 else ""))
        second = Worker(environment, tmp_path / "second.log", "-p", "1", "-t", "4")
        try:
            await until(lambda: second.says("ready for action"), timeout=20)
            assert await asyncio.to_thread(first.stop) == 0
            third = Worker(environment, tmp_path / "third.log", "-p", "1", "-t", "4")
            try:
                await until(lambda: third.says("ready for action"), timeout=20)
                assert await asyncio.to_thread(second.stop) == 0
                await until(lambda: all_completed(ledger), timeout=30)
            finally:
                await asyncio.to_thread(third.stop)
        finally:
            await asyncio.to_thread(second.stop)
    await effects_once(ledger)
    assert await ledger.connection.fetchval("SELECT max(attempts) FROM outbox_message") == 1


async def test_a_second_signal_does_not_wait_for_what_runs(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment["OUTBOX__SHUTDOWN_GRACE"] = "60"
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang"))
        await until(lambda: is_state(ledger, message_id, "running"))
        worker.process.terminate()
        await until(lambda: worker.says("Stopping worker process"), timeout=10)
        worker.process.terminate()
        await until(lambda: worker.process.poll() is not None, timeout=5)


async def test_the_relay_process_stops_at_once_with_status_0(
    ledger: Ledger, environment: dict[str, str], tmp_path: Path
) -> None:
    with (tmp_path / "relay.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", "relay", env=environment, stderr=log
        )
    try:
        await until(lambda: "relay.started" in (tmp_path / "relay.log").read_text(), timeout=20)
        process.terminate()
        async with asyncio.timeout(5):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_queues_have_worker_pools_of_their_own(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """A CPU-bound `def` consumer in a process of its own keeps no other queue waiting."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(working(environment, settings, tmp_path, "-p", "1", "-t", "2", "-Q", "ledger"))
        cpu = Worker(environment, tmp_path / "cpu.log", "-p", "1", "-t", "1", "-Q", "cpu")
        stack.push_async_callback(asyncio.to_thread, cpu.stop)
        await until(lambda: cpu.says("ready for action"), timeout=20)
        busy = [(await ledger.publish(domain.Computed(subject_id=uuid4(), how="spin")))[0] for _ in range(2)]
        await until(lambda: is_state(ledger, busy[0], "running"))
        (prompt,) = await ledger.publish()
        await until(lambda: is_state(ledger, prompt, "completed"), timeout=2)
        assert await ledger.state(busy[0]) == "running"


class Renamed(Event, type="ledger.renamed"):
    subject_id: UUID
    added: int = 7
    """A field that older publishers do not know."""


@consumer(Renamed, queue="ledger", name="ledger.after_rename", formerly=["ledger.before_rename"])
async def after_rename(event: Renamed, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        await domain.write_effect(session, delivery, str(event.added))


async def test_rows_of_a_renamed_consumer_and_of_an_older_publisher_are_delivered(
    ledger: Ledger, runner: Runner
) -> None:
    (message_id,) = await ledger.publish(Renamed(subject_id=uuid4()))
    await ledger.set(message_id, consumer="ledger.before_rename", state="dispatched")
    await ledger.connection.execute("UPDATE outbox_message SET payload = payload - 'added'")
    await runner.deliver(message_id)
    assert await ledger.connection.fetchval("SELECT note FROM effect") == "7"


class Forwarded(Event, type="ledger.forwarded"):
    subject_id: UUID


OTHER: list[SessionFactory] = []
"""The other service's sessions."""

CRASHES = iter(["before", "after", ""])


@consumer(Forwarded, queue="ledger", name="ledger.forward")
async def forward(event: Forwarded, delivery: Delivery) -> None:
    """Hands the event to another service, which here is another database; dies around its acknowledgement."""
    crash = next(CRASHES)
    if crash == "before":
        raise RuntimeError("crashed before the other service answered")
    async with transaction(OTHER[0]) as session:
        await accept(session, f"sender:{delivery.idempotency_key}", domain.Happened(subject_id=event.subject_id))
    if crash == "after":
        raise RuntimeError("crashed before it noted the answer")


@pytest.fixture
async def receiver(settings: Settings, worker_database_url: str) -> AsyncIterator[Ledger]:
    """The service that accepts, with a database of its own."""
    theirs = settings.database.model_copy(update={"url": type(settings.database.url)(worker_database_url)})
    engine = create_engine(theirs, application_name="receiver")
    connection = await asyncpg.connect(worker_database_url)
    await connection.execute(domain.SCHEMA)
    OTHER[:] = [session_factory(engine)]
    yield Ledger(connection, OTHER[0])
    await connection.execute("TRUNCATE outbox_message, accepted_event, effect")
    await connection.close()
    await engine.dispose()


async def test_what_one_service_forwards_another_accepts_once(
    ledger: Ledger, runner: Runner, receiver: Ledger, settings: Settings
) -> None:
    (message_id,) = await ledger.publish(Forwarded(subject_id=uuid4()))
    for _ in range(3):
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"
    (accepted,) = await receiver.connection.fetch("SELECT id FROM outbox_message")
    theirs = settings.model_copy(deep=True)
    theirs.database.url = type(theirs.database.url)(
        OTHER[0].kw["bind"].url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    second = Runner(theirs, OTHER[0].kw["bind"])
    await second.open()
    await second.deliver(accepted["id"])
    await second.deliver(accepted["id"])
    await second.close()
    assert await receiver.effects(accepted["id"]) == 1
