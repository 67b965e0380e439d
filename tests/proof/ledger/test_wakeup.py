"""The gated notification: a sleeping relay misses nothing, and an awake one costs the writers nothing.

A `Wakeup` is asked to sleep for far longer than a test lasts, so whatever ends a sleep here is a notification.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from relay.process.wakeup import Wakeup
from service.ledger import delivering
from service.ledger.dispatching import queue_heads
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.database.driver import Connection
    from tests.proof.ledger.conftest import Connect, Ledger

INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES ($1, $1, 'ledger.happened', 1, 'ledger.react', 'ledger', '{}', '{}')
"""


class Sleeper:
    """A relay that does nothing but sleep, and counts what it finds when it wakes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.wakeup = Wakeup(connection)
        self.sleeps = 0

    async def look(self) -> float:
        return min((head.due_in for head in await queue_heads(self.connection)), default=float("inf"))

    async def sleep(self) -> None:
        """One sleep."""
        self.sleeps += 1
        await self.wakeup.sleep(self.look, 600)

    async def consume(self, expected: int) -> None:
        """Sleep and take rows until as many as expected were taken."""
        while expected > 0:
            taken = await self.connection.fetch(
                "DELETE FROM outbox_message WHERE state <> 'completed' AND due_at <= now() RETURNING id"
            )
            expected -= len(taken)
            if not taken:
                await self.sleep()


@pytest.fixture
async def sleeper(ledger: Ledger, connect: Connect) -> Sleeper:
    sleeper = Sleeper(await connect())
    await sleeper.wakeup.open(await connect())
    return sleeper


async def asleep(ledger: Ledger) -> bool:
    """Whether somebody holds the sleeper's lock and has nothing left to ask."""
    return bool(
        await ledger.connection.fetchval(
            """SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
               WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND pg_stat_activity.state = 'idle'
                 AND query LIKE '%WITH RECURSIVE%' AND datname = current_database()"""
        )
    )


async def falls_asleep(ledger: Ledger, sleeper: Sleeper) -> asyncio.Task[None]:
    await sleeper.connection.execute("SELECT 1")  # takes in what was notified before
    task = asyncio.create_task(sleeper.sleep())
    await until(lambda: asleep(ledger), every=0.002)
    return task


async def wakes(task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(60):
        await task


async def test_a_commit_wakes_a_sleeper(ledger: Ledger, sleeper: Sleeper) -> None:
    task = await falls_asleep(ledger, sleeper)
    await ledger.publish()
    await wakes(task)


async def test_a_delayed_event_wakes_a_sleeper_that_meant_to_sleep_longer(ledger: Ledger, sleeper: Sleeper) -> None:
    task = await falls_asleep(ledger, sleeper)
    await ledger.publish(delay=timedelta(hours=1))
    await wakes(task)


async def test_a_rolled_back_savepoint_keeps_the_notification_of_the_rest(
    ledger: Ledger, sleeper: Sleeper, connect: Connect
) -> None:
    writer = await connect()
    task = await falls_asleep(ledger, sleeper)
    async with writer.transaction():
        try:
            async with writer.transaction():
                await writer.execute(INSERT, uuid4())
                raise RuntimeError
        except RuntimeError:
            pass
        await writer.execute(INSERT, uuid4())
    await wakes(task)


async def test_copy_wakes_a_sleeper(ledger: Ledger, sleeper: Sleeper, connect: Connect) -> None:
    writer = await connect()
    task = await falls_asleep(ledger, sleeper)
    columns = ["id", "event_id", "event_type", "version", "consumer", "queue", "payload", "headers"]
    record = (uuid4(), uuid4(), "ledger.happened", 1, "ledger.react", "ledger", "{}", "{}")
    await writer.copy_records_to_table("outbox_message", records=[record], columns=columns)
    await wakes(task)


async def test_a_prepared_transaction_wakes_a_sleeper_or_keeps_it_awake(
    ledger: Ledger, sleeper: Sleeper, connect: Connect
) -> None:
    """One that notified cannot be prepared; one that holds the shared lock can, and no relay falls asleep past it."""
    writer = await connect()
    await writer.execute("BEGIN")
    await writer.execute(INSERT, uuid4())
    await writer.execute("PREPARE TRANSACTION 'outbox_test'")
    try:
        task = asyncio.create_task(sleeper.sleep())
        await wakes(task)
        assert not await asleep(ledger)
    finally:
        await writer.execute("COMMIT PREPARED 'outbox_test'")
    assert await sleeper.look() <= 0


async def test_nobody_falls_asleep_past_a_long_writer(ledger: Ledger, sleeper: Sleeper, connect: Connect) -> None:
    """It wrote while the relay was awake, so it did not notify; the relay looks again, soon, until it has committed."""
    writer = await connect()
    transaction = writer.transaction()
    await transaction.start()
    await writer.execute(INSERT, uuid4())
    async with asyncio.timeout(60):
        for _ in range(3):
            await sleeper.sleep()
    await transaction.commit()
    async with asyncio.timeout(60):
        await sleeper.consume(1)


@pytest.mark.parametrize("call", ["fail", "release"])
async def test_a_row_put_back_wakes_a_sleeper(ledger: Ledger, sleeper: Sleeper, connect: Connect, call: str) -> None:

    message_id = await ledger.happen()
    await ledger.set(message_id, due_at=datetime(2100, 1, 1, tzinfo=UTC))
    worker = await connect()
    claim = await delivering.claim(worker, message_id, uuid4(), timedelta(hours=1))
    assert claim is not None
    task = await falls_asleep(ledger, sleeper)
    if call == "fail":
        await delivering.fail(worker, claim, {"type": "E"}, timedelta(seconds=5))
    else:
        await delivering.release(worker, claim)
    await wakes(task)


async def test_an_awake_relay_is_not_notified(ledger: Ledger, sleeper: Sleeper) -> None:
    """The point of the gate: a notification would make commits run one by one."""
    heard = []
    await sleeper.connection.add_listener("outbox", lambda *_: heard.append(1))
    for _ in range(20):
        await ledger.publish()
    await sleeper.connection.execute("SELECT 1")
    assert not heard


async def test_a_woken_relay_is_not_notified_either(ledger: Ledger, sleeper: Sleeper) -> None:
    """While it is awake, a lock that it kept from its sleep would have every commit notify it."""
    task = await falls_asleep(ledger, sleeper)
    await ledger.publish()
    await wakes(task)
    assert await gate_is_free(ledger)
    heard = []
    await sleeper.connection.add_listener("outbox", lambda *_: heard.append(1))
    await ledger.publish()
    await sleeper.connection.execute("SELECT 1")
    assert not heard


async def test_two_ledgers_in_one_database_do_not_wake_each_other(
    ledger: Ledger, sleeper: Sleeper, connect: Connect
) -> None:
    neighbour, bystander = await connect(), await connect()
    await neighbour.execute(
        """CREATE SCHEMA neighbour; CREATE TABLE neighbour.outbox_message (LIKE outbox_message INCLUDING ALL);
           CREATE TRIGGER outbox_wake AFTER INSERT ON neighbour.outbox_message
           FOR EACH STATEMENT EXECUTE FUNCTION outbox_wake_trigger(); SET search_path = neighbour, public"""
    )
    heard = []
    await bystander.add_listener("outbox", lambda *_: heard.append(1))
    task = await falls_asleep(ledger, sleeper)
    await neighbour.execute(INSERT, uuid4())
    await bystander.execute("SELECT 1")
    assert not heard
    await ledger.publish()
    await until(lambda: heard)
    await wakes(task)


async def test_of_two_idle_relays_one_sleeps_and_neither_holds_back_vacuum(
    ledger: Ledger, sleeper: Sleeper, connect: Connect
) -> None:
    other = Sleeper(await connect())
    await other.wakeup.open(await connect())
    first = await falls_asleep(ledger, sleeper)
    second = asyncio.create_task(other.sleep())
    await until(lambda: nothing_held_back(ledger), every=0.002)
    await ledger.publish()
    await wakes(first)
    await wakes(second)


async def nothing_held_back(ledger: Ledger) -> bool:
    """Whether no other session has a snapshot or waits for a lock."""
    return not await ledger.connection.fetchval(
        """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
           AND (backend_xmin IS NOT NULL OR wait_event_type = 'Lock')"""
    )


async def test_a_sleepers_death_leaves_the_gate_open(ledger: Ledger, sleeper: Sleeper, connect: Connect) -> None:
    heir = Sleeper(await connect())
    await heir.wakeup.open(await connect())
    task = await falls_asleep(ledger, sleeper)
    await ledger.connection.execute("SELECT pg_terminate_backend($1)", sleeper.connection.get_server_pid())
    await wakes(task)
    await until(lambda: gate_is_free(ledger))
    heirs = await falls_asleep(ledger, heir)
    await ledger.publish()
    await wakes(heirs)


@pytest.mark.slow
async def test_a_ghost_sleeper_is_ended(
    ledger: Ledger, environment: dict[str, str], tmp_path: Path, connect: Connect
) -> None:
    """A stopped relay process would hold the sleeper's lock for ever, and every commit would notify it."""
    shorter = "s.SESSION.update({name: '1s' for name in s.SESSION if name == 'idle_session_timeout'})"
    (tmp_path / "sitecustomize.py").write_text(f"import relay.process.relay_session as s\n{shorter}\n")
    with (tmp_path / "log").open("wb") as log:
        path = f"{tmp_path}:{os.curdir}"
        ghost = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", "relay", env=environment | {"PYTHONPATH": path}, stderr=log
        )
    try:
        await until(lambda: asleep(ledger))
        ghost.send_signal(signal.SIGSTOP)
        await until(lambda: gate_is_free(ledger))
        heir = Sleeper(await connect())
        await heir.wakeup.open(await connect())
        task = await falls_asleep(ledger, heir)
        await ledger.publish()
        await wakes(task)
    finally:
        ghost.kill()
        await ghost.wait()


async def gate_is_free(ledger: Ledger) -> bool:
    count = await ledger.connection.fetchval(
        """SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock'
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
    )
    return not count


async def test_no_event_of_many_writers_is_missed_without_any_poll(
    ledger: Ledger, sleeper: Sleeper, connect: Connect
) -> None:
    """Writers commit at random moments around the relay's falling asleep; only notifications wake it."""
    writers, each = 8, 60

    async def write(connection: Connection, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(each):
            async with connection.transaction():
                await connection.execute(INSERT, uuid4())
                if chance.random() < 0.3:
                    await asyncio.sleep(chance.random() * 0.01)
            await asyncio.sleep(chance.random() * 0.02)

    consumer = asyncio.create_task(sleeper.consume(writers * each))
    await asyncio.gather(*[write(await connect(), seed) for seed in range(writers)])
    async with asyncio.timeout(60):
        await consumer
    assert sleeper.sleeps > 10
