"""Batch consumers in a real worker: what is gathered, what is given back, and what is acknowledged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import redis.asyncio

from service.worker.batch_worker import Gathering
from tests.proof.ledger.batched import SIZE, Weighed
from tests.proof.ledger.looks import all_completed, all_dispatched, effects_once
from tests.servers.processes import Started
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.server import Rabbitmq

ONE_THREAD = ("-p", "1", "-t", "1")


def test_what_arrives_while_batches_run_is_the_next_one() -> None:
    gathering = Gathering(3)
    items = [SimpleNamespace(number=number) for number in range(9)]

    def add(number: int) -> object:
        gathering.items.append(items[number])
        return gathering.next()

    assert add(0) is items[0]  # at once, alone
    assert gathering.begin(items[0]) == [items[0]]
    assert add(1) is items[1]
    assert add(2) is None  # 1 stands in line for it
    assert gathering.begin(items[1]) == [items[1], items[2]]
    assert [add(number) for number in range(3, 9)] == [None] * 6  # two run
    gathering.end()
    assert gathering.next() is items[3]
    assert gathering.begin(items[3]) == items[3:6]
    assert gathering.next() is None
    gathering.end()
    assert gathering.next() is items[6]


async def weighed(ledger: Ledger, settings: Settings, how: str = "", count: int = 5 * SIZE) -> list[UUID]:
    """Hand so many over before there is a worker."""
    ids = [(await ledger.publish(Weighed(subject_id=uuid4(), how=how)))[0] for _ in range(count)]
    async with relaying(settings):
        await until(lambda: all_dispatched(ledger))
    return ids


def worker(environment: dict[str, str], folder: Path, app: str = "batched") -> Started:
    module = f"tests.proof.ledger.{app}:setup_broker"
    return Started(environment, folder / "worker.log", "dramatiq", module, *ONE_THREAD)


async def unacknowledged(settings: Settings) -> int:
    """Messages that a worker has, and those in the queue."""
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        namespace = settings.broker.namespace
        keys = [key async for key in client.scan_iter(match=f"{namespace}:__acks__.*.ledger")]
        return int(await client.llen(f"{namespace}:ledger")) + sum([await client.scard(key) for key in keys])


async def largest(ledger: Ledger) -> int:
    return int(await ledger.connection.fetchval("SELECT max(note::int) FROM effect"))


@pytest.mark.slow
async def test_what_waits_runs_together(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    await weighed(ledger, settings)
    started = worker(environment, tmp_path)
    try:
        await until(lambda: all_completed(ledger))
        await until(lambda: acknowledged(settings))
    finally:
        await started.stop()
    await effects_once(ledger)
    assert await largest(ledger) == SIZE
    assert started.says('"deliveries": 8')


async def acknowledged(settings: Settings) -> bool:
    return await unacknowledged(settings) == 0


@pytest.mark.slow
async def test_what_waits_in_rabbitmq_runs_together(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path, rabbitmq: Rabbitmq
) -> None:
    environment["BROKER__URL"] = rabbitmq.url
    settings.broker.url = type(settings.broker.url)(rabbitmq.url)
    await weighed(ledger, settings)
    started = worker(environment, tmp_path)
    try:
        await until(lambda: all_completed(ledger))
    finally:
        await started.stop()
    await effects_once(ledger)
    assert await largest(ledger) == SIZE


@pytest.mark.slow
async def test_a_stop_waits_for_batches_and_gives_back_what_is_gathered(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    ids = await weighed(ledger, settings, "slow")
    started = worker(environment, tmp_path)
    try:
        await until(lambda: two_run(ledger))
    finally:
        assert await started.stop() == 0
    states = [await ledger.state(each) for each in ids]
    assert set(states) == {"completed", "dispatched"}
    assert await unacknowledged(settings) == states.count("dispatched")
    await effects_once(ledger)


async def two_run(ledger: Ledger) -> bool:
    """Whether two batches run."""
    claims: int = await ledger.connection.fetchval(
        "SELECT count(DISTINCT xmin::text) FROM outbox_message WHERE state = 'running'"
    )
    return claims == 2


@pytest.mark.slow
async def test_each_message_passes_the_hooks_of_dramatiqs_middleware(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    skipped, *ids = await weighed(ledger, settings, count=SIZE)
    environment["VERSION"] = str(skipped)
    started = worker(environment, tmp_path, "hooked_app")
    try:
        for each in ids:
            await until(lambda each=each: started.says(f"acknowledged {each}"))  # type: ignore[misc]
            # In the context that the hook before has left, though they ran together.
            assert started.says(f"after {each} True None")
        await until(lambda: started.says(f"acknowledged {skipped}"))
        assert started.says(f"skipped {skipped}")
        assert not started.says(f"after {skipped}")
    finally:
        await started.stop()
    row = await ledger.row(skipped)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("dispatched", 0)
    await effects_once(ledger)
