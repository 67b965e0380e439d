"""`async def` consumers on a worker's event loop: how many at a time, whose turn it is, and how they end."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import redis.asyncio

from service.worker.loop_worker import _Turns
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, dispatched, is_state
from tests.proof.ledger.working import start_worker, working
from tests.servers.processes import Started
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.outbox.running.runner import Runner
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

ONE_THREAD = ("-p", "1", "-t", "1")


def item(priority: int, queue: str, number: int) -> SimpleNamespace:
    """As Dramatiq makes them, as far as it matters."""
    return SimpleNamespace(priority=priority, message=SimpleNamespace(queue_name=queue), number=number)


def test_queues_take_turns_within_a_priority() -> None:
    turns = _Turns()
    for number in range(4):
        turns.add(item(0, "long", number))
    turns.add(item(0, "short", 4))
    turns.add(item(5, "other", 5))
    turns.add(item(-5, "long", 6))
    turns.add(item(0, "third", 7))
    order = []
    while turns:
        order.append(turns.next().number)
    assert order == [6, 0, 4, 7, 1, 2, 3, 5]


async def running(ledger: Ledger, count: int) -> bool:
    """Whether so many run."""
    found: int = await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'running'")
    return found == count


async def hang(ledger: Ledger, how: str = "hang") -> UUID:
    (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how=how))
    return message_id


async def attempts(ledger: Ledger) -> set[int]:
    return {row["attempts"] for row in await ledger.connection.fetch("SELECT attempts FROM outbox_message")}


@pytest.mark.slow
async def test_more_run_at_a_time_than_there_are_threads(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__TIME_LIMIT": "60000"}
    async with working(environment, settings, tmp_path, *ONE_THREAD):
        for _ in range(30):
            await hang(ledger)
        await until(lambda: running(ledger, 30))


@pytest.mark.slow
async def test_no_more_are_claimed_than_may_run(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__CONCURRENCY": "3", "OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__TIME_LIMIT": "60000"}
    async with working(environment, settings, tmp_path, *ONE_THREAD):
        ids = [await hang(ledger) for _ in range(6)]
        await until(lambda: running(ledger, 3))
        await until(lambda: handed_over_again(ledger, 3))
        assert await running(ledger, 3)
    # Given back to the broker, as those that ran to the ledger.
    assert {await ledger.state(each) for each in ids} <= {"pending", "dispatched"}
    assert await attempts(ledger) == {0}


async def handed_over_again(ledger: Ledger, count: int) -> bool:
    """Whether so many were not claimed for so long that the relay tried again."""
    found: int = await ledger.connection.fetchval(
        "SELECT count(*) FROM outbox_message WHERE state = 'dispatched' AND dispatches > 1"
    )
    return found == count


@pytest.mark.slow
async def test_a_long_queue_holds_no_other_up(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment["OUTBOX__CONCURRENCY"] = "1"
    for _ in range(8):
        await hang(ledger, "slow")
    _, other = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    worker = start_worker(environment, tmp_path / "worker.log", *ONE_THREAD)
    try:
        async with relaying(settings):
            await until(lambda: all_completed(ledger))
    finally:
        await worker.stop()
    row = await ledger.row(other)
    assert row is not None
    before: int = await ledger.connection.fetchval(
        "SELECT count(*) FROM outbox_message WHERE queue = 'ledger' AND completed_at < $1", row["completed_at"]
    )
    assert before <= 4


@pytest.mark.slow
async def test_hooks_of_dramatiqs_middleware_are_called(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    ids = [await hang(ledger, "slow") for _ in range(2)]
    skipped = await hang(ledger)
    environment["VERSION"] = str(skipped)
    worker = Started(
        environment, tmp_path / "worker.log", "dramatiq", "tests.proof.ledger.hooked_app:setup_broker", *ONE_THREAD
    )
    try:
        async with relaying(settings):
            await until(lambda: worker.says(f"skipped {skipped}"))
            await until(lambda: worker.says(f"acknowledged {skipped}"))
            for each in ids:
                await until(lambda each=each: worker.says(f"acknowledged {each}"))  # type: ignore[misc]
                # In the context that the hook before has left, though both ran at a time.
                assert worker.says(f"after {each} True None")
            assert not worker.says(f"after {skipped}")
            row = await ledger.row(skipped)
            assert row is not None
            assert row["attempts"] == 0
    finally:
        await worker.stop()


@pytest.mark.slow
async def test_one_that_goes_on_when_it_is_cancelled_makes_room(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__CONCURRENCY": "1", "OUTBOX__TIME_LIMIT": "500", "OUTBOX__GRACE": "0.5"}
    environment["OUTBOX__SHUTDOWN_GRACE"] = "1"
    async with working(environment, settings, tmp_path, *ONE_THREAD) as worker:
        await ledger.publish(domain.Endless(subject_id=uuid4()))
        await until(lambda: running(ledger, 1))
        (next_one,) = await ledger.publish()
        await until(lambda: is_state(ledger, next_one, "completed"))
        assert worker.says("worker.abandoned")
        began = time.monotonic()
        assert await worker.stop() == 0
        assert time.monotonic() - began < 30


@pytest.mark.slow
async def test_a_stop_waits_for_what_runs_and_gives_back_what_waits(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__CONCURRENCY": "1", "OUTBOX__REDISPATCH_AFTER": "600"}
    settings.outbox.redispatch_after = 600
    async with working(environment, settings, tmp_path, *ONE_THREAD) as worker:
        ids = [await hang(ledger, "slower") for _ in range(3)]
        await until(lambda: running(ledger, 1))
        for each in ids[1:]:
            await until(lambda each=each: dispatched(ledger, each))  # type: ignore[misc]
        async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
            await until(lambda: fetched(client, settings, 3))
            assert await worker.stop() == 0
            assert await client.llen(f"{settings.broker.namespace}:ledger") == 2
    assert sorted([str(await ledger.state(each)) for each in ids]) == ["completed", "dispatched", "dispatched"]


async def fetched(client: redis.asyncio.Redis, settings: Settings, count: int) -> bool:
    """Whether workers have so many messages."""
    keys = [key async for key in client.scan_iter(match=f"{settings.broker.namespace}:__acks__.*.ledger")]
    return sum([await client.scard(key) for key in keys]) == count


@pytest.mark.slow
async def test_a_message_that_names_another_consumer_is_given_back(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """A `def` consumer is not for the loop."""
    (message_id,) = await ledger.publish(domain.Computed(subject_id=uuid4()))
    await ledger.set(message_id, state="dispatched", dispatches=1)
    unique = str(uuid4())
    body = {"queue_name": "ledger", "actor_name": "ledger.react", "args": [str(message_id)], "kwargs": {},
            "options": {"redis_message_id": unique}, "message_id": unique, "message_timestamp": 1}  # fmt: skip
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        await client.hset(f"{settings.broker.namespace}:ledger.msgs", unique, json.dumps(body))
        await client.rpush(f"{settings.broker.namespace}:ledger", unique)
    async with working(environment, settings, tmp_path):
        await until(lambda: is_state(ledger, message_id, "completed"))
    assert await attempts(ledger) == {1}


@pytest.mark.slow
async def test_waiting_for_a_connection_is_not_the_consumers_time(
    ledger: Ledger, settings: Settings, runner: Runner
) -> None:
    settings.outbox.time_limit = 6_000
    count = settings.database.pool_size
    ids = [(await ledger.publish(domain.Gated(subject_id=uuid4())))[0] for _ in range(2 * count)]
    gates = {each: domain.Gate() for each in ids}
    for each, gate in gates.items():
        domain.GATES[str(each)] = [gate]
        await ledger.set(each, state="dispatched", dispatches=1)
    runs = [asyncio.create_task(runner.deliver(each)) for each in ids]
    left = list(gates.values())
    for short in (True, False):
        await until(lambda: sum(each.reached.is_set() for each in left) == count)
        await until(lambda short=short: runner.connections.short == short)  # type: ignore[misc]
        await asyncio.sleep(4)  # the consumers' work, which is within the limit, and with the wait is not
        for gate in [gate for gate in left if gate.reached.is_set()]:
            gate.opened.set()
            left.remove(gate)
    await asyncio.gather(*runs)
    assert await all_completed(ledger)
    assert await attempts(ledger) == {1}


@pytest.mark.slow
async def test_nothing_is_claimed_while_a_run_waits_for_a_connection(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"DATABASE__POOL_SIZE": "1", "OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__TIME_LIMIT": "60000"}
    async with working(environment, settings, tmp_path, *ONE_THREAD):
        for count in (1, 2):
            await hang(ledger, "hang_inside")
            await until(lambda count=count: running(ledger, count))  # type: ignore[misc]
        await hang(ledger)
        await until(lambda: handed_over_again(ledger, 1))
        assert await running(ledger, 2)
