"""Real worker processes under the stock Dramatiq CLI, with a relay on the test's loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import subprocess
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import redis.asyncio
from pydantic import SecretStr

from service.outbox.testing import inline_worker
from service.telemetry.logs import trace_context
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, is_state
from tests.proof.ledger.working import start_worker, working
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.dev.valkey import Valkey
    from service.outbox import Event
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


@pytest.mark.slow
async def test_effects_of_many_events_happen_once(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path):
        ids = [await ledger.publish() for _ in range(50)]
        await until(lambda: all_completed(ledger))
    assert [await ledger.effects(each[0]) for each in ids] == [1] * 50


@pytest.mark.slow
async def test_a_plain_def_consumer_runs_fails_and_is_limited(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path) as worker:
        (fine,) = await ledger.publish(domain.Computed(subject_id=uuid4()))
        (begins,) = await ledger.publish(domain.Computed(subject_id=uuid4(), how="begin"))
        (fails,) = await ledger.publish(domain.Computed(subject_id=uuid4(), how="fail"))
        (spins,) = await ledger.publish(domain.Computed(subject_id=uuid4(), how="spin"))
        await until(lambda: is_state(ledger, fine, "completed"))
        await until(lambda: is_state(ledger, begins, "dead"))
        await until(lambda: is_state(ledger, fails, "dead"))

        async def limited() -> bool:
            row = await ledger.row(spins) or await ledger.dead_letter(spins)
            return row is not None and "TimeLimitExceeded" in row["errors"]

        await until(limited)
        await until(lambda: is_state(ledger, spins, "dead"))
        assert worker.process.poll() is None
    letter = await ledger.dead_letter(begins)
    assert letter is not None
    assert "`def` consumer cannot call begin()" in letter["reason"]


@pytest.mark.slow
async def test_a_def_consumer_is_run_alike_by_the_test_kit(
    ledger: Ledger, engine: AsyncEngine, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """What surrounds it, what its time limit does, and what is written down of it."""

    async def run(by: str, how: str) -> tuple[str, ...]:
        seen = tmp_path / f"{by} {how}"
        with trace_context({"correlation_id": "abc"}):
            (message_id,) = await ledger.publish(domain.Compared(seen=str(seen), how=how))
        if by == "test kit":
            async with inline_worker(settings, engine) as kit:
                await kit.deliver_all(may_fail=True)
        await until(lambda: ended(ledger, message_id))
        row = await ledger.row(message_id) or await ledger.dead_letter(message_id)
        assert row is not None
        error = re.search(r'"type": "\w+"', row["errors"])
        return seen.read_text(), str(await ledger.state(message_id)), str(row["attempts"]), str(error and error[0])

    ways = ("returns", "raises", "does not end")
    kits = [await run("test kit", how) for how in ways]
    async with working(environment, settings, tmp_path):
        assert [await run("worker", how) for how in ways] == kits
    assert [each[-1] for each in kits] == ["None", '"type": "SystemExit"', '"type": "TimeLimitExceeded"']


async def ended(ledger: Ledger, message_id: UUID) -> bool:
    return await ledger.state(message_id) in ("completed", "dead")


@pytest.mark.slow
async def test_what_a_killed_worker_ran_runs_again(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="slow"))
        await until(lambda: is_state(ledger, message_id, "running"))
        for child in worker.children():
            child.kill()
        worker.process.kill()
        worker.process.wait()
        second = start_worker(environment, tmp_path / "second.log")
        try:
            await until(lambda: is_state(ledger, message_id, "completed"))
        finally:
            await second.stop()
    row = await ledger.row(message_id)
    assert row is not None
    assert row["attempts"] == 2
    assert await ledger.effects(message_id) == 1


async def until_dead(
    ledger: Ledger, environment: dict[str, str], settings: Settings, folder: Path, poison: UUID
) -> int:
    """Start a worker when the last has ended, as a supervisor does; how many were lost until the dead letter."""
    async with relaying(settings):
        for number in range(5):
            worker = start_worker(environment, folder / f"{number}.log", "-p", "1", "-t", "1")
            try:
                await until(lambda process=worker.process: gone_or_dead(process, ledger, poison))  # type: ignore[misc]
            finally:
                await worker.stop()
            if await ledger.dead_letter(poison):
                return number
            assert worker.process.returncode in (1, 70)
    raise AssertionError("it is not dead")


@pytest.mark.parametrize(
    ("event", "attempts"),
    [
        (domain.Happened(subject_id=uuid4(), how="kill"), 3),
        (domain.Happened(subject_id=uuid4(), how="block_for_ever"), 3),
        (domain.Computed(subject_id=uuid4(), how="stick"), 2),
    ],
    ids=["kills its process", "blocks the event loop", "blocks its thread"],
)
@pytest.mark.slow
async def test_poison_that_costs_its_worker_ends_as_a_dead_letter(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path, event: Event, attempts: int
) -> None:
    """Dramatiq's master ends when a child has; a supervisor starts the next."""
    environment["OUTBOX__TIME_LIMIT"] = "1000"
    (poison,) = await ledger.publish(event)
    neighbours = [(await ledger.publish())[0] for _ in range(10)]
    assert await until_dead(ledger, environment, settings, tmp_path, poison) == attempts
    letter = await ledger.dead_letter(poison)
    assert letter is not None
    assert letter["reason"] == "worker lost"
    assert letter["attempts"] == attempts + 1
    assert await ledger.effects(poison) == 0
    async with working(environment, settings, tmp_path):
        await until(lambda: all_completed(ledger))
    assert [await ledger.effects(each) for each in neighbours] == [1] * 10


@pytest.mark.slow
async def test_a_worker_that_stood_still_is_not_taken_for_stuck(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await ledger.publish(domain.Computed(subject_id=uuid4(), how="nap"))
        await until(lambda: is_state(ledger, message_id, "running"))
        family = worker.children()
        for each in family:
            each.suspend()
        await asyncio.sleep(7)  # the fault itself, longer than limit, grace and lease
        for each in family:
            each.resume()
        await until(lambda: is_state(ledger, message_id, "completed"))
        assert await worker.stop() == 0


async def is_dead(ledger: Ledger, message_id: UUID) -> bool:
    return await ledger.dead_letter(message_id) is not None


async def gone_or_dead(process: subprocess.Popen[bytes], ledger: Ledger, message_id: UUID) -> bool:
    return process.poll() is not None or await is_dead(ledger, message_id)


@pytest.mark.slow
async def test_sigterm_releases_what_does_not_end_in_the_grace(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment |= {"OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__TIME_LIMIT": "60000"}
    async with working(environment, settings, tmp_path) as worker:
        (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang"))
        await until(lambda: is_state(ledger, message_id, "running"))
        assert await worker.stop() == 0
        row = await ledger.row(message_id)
    assert row is not None
    assert row["attempts"] == 0
    assert row["state"] in ("pending", "dispatched")


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [False, True], ids=["in Python", "in a call that nothing interrupts"])
async def test_sigterm_releases_a_def_consumer_that_does_not_end_in_the_grace(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path, at_once: bool
) -> None:
    environment |= {"OUTBOX__SHUTDOWN_GRACE": "0.5", "OUTBOX__TIME_LIMIT": "60000"}
    arguments = ("-p", "1", "-t", "4") + (("--worker-shutdown-timeout", "2000") if at_once else ())
    async with working(environment, settings, tmp_path, *arguments) as worker:
        event = domain.Endured(subject_id=uuid4(), seconds=60, at_once=at_once)
        *_, message_id = await ledger.publish(event)
        await until(lambda: is_state(ledger, message_id, "running"))
        assert await worker.stop() == 0
        row = await ledger.row(message_id)
    assert row is not None
    assert row["attempts"] == 0
    assert row["state"] in ("pending", "dispatched")


@pytest.mark.slow
async def test_bodies_nobody_can_run_hurt_no_neighbour(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Stock Dramatiq strands the neighbours of the first and loses a thread to the second."""
    client = redis.asyncio.Redis.from_url(settings.broker.redis_url)
    key = f"{settings.broker.namespace}:ledger"
    other_queue = json.dumps(
        {"queue_name": "nowhere", "actor_name": "ledger.react", "args": [str(uuid4())], "kwargs": {},
         "options": {"redis_message_id": "b"}, "message_id": "b", "message_timestamp": 1}
    )  # fmt: skip
    bad: dict[str, str | bytes] = {
        "a": b"\xff not json",
        "b": other_queue,
        "c": b"{}",
        "d": b"[]",
        "e": b"null",
        "f": b'{"options": 3}',
        "g": other_queue.replace("nowhere", "ledger").replace('"ledger.react"', "[]").replace('"b"', '"g"'),
    }
    for name, body in bad.items():
        await client.hset(f"{key}.msgs", name, body)
        await client.rpush(key, name)
    ids = [await ledger.publish() for _ in range(20)]
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "2"):
        await until(lambda: all_completed(ledger))

        async def drained() -> bool:
            return not await client.exists(f"{key}.msgs", key)

        await until(drained)
    await client.aclose()
    assert [await ledger.effects(each[0]) for each in ids] == [1] * 20


async def push(settings: Settings, queue: str, fields: dict[str, object]) -> None:
    """Push a body as Dramatiq's would be, but for what `fields` say."""
    unique = str(uuid4())
    body = {"actor_name": "ledger.react", "args": [], "kwargs": {}, "message_id": unique, "message_timestamp": 1,
            "queue_name": queue, **fields}  # fmt: skip
    body["options"] = {"redis_message_id": unique, **fields["options"]}  # type: ignore[dict-item]
    key = f"{settings.broker.namespace}:{queue}"
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        await client.hset(f"{key}.msgs", unique, json.dumps(body))
        await client.rpush(key, unique)


FOREIGN_OPTIONS: list[dict[str, object]] = [
    {"time_limit": 1},
    {"max_age": 1},
    {"on_success": "ledger.react", "pipe_target": {"queue_name": "ledger"}},
    *[dict[str, object](eta=99_999_999_999_999) for _ in range(6)],
]
"""More `eta` than the worker of the tests below prefetches."""


@pytest.mark.parametrize("suffix", ["", ".DQ"])
@pytest.mark.slow
async def test_options_in_a_body_reach_no_delivery(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path, suffix: str
) -> None:
    """Dramatiq would keep the last in memory until 5138, fetch nothing more, and end the run of the first."""
    environment["OUTBOX__CONCURRENCY"] = "1"
    ids = [await ledger.happen("slower") for _ in FOREIGN_OPTIONS]
    for message_id, options in zip(ids, FOREIGN_OPTIONS, strict=True):
        await push(settings, f"ledger{suffix}", {"args": [str(message_id)], "options": options})
    worker = start_worker(environment, tmp_path / "worker.log", "-p", "1", "-t", "2")
    try:
        await until(lambda: all_completed(ledger))
    finally:
        await worker.stop()
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE attempts <> 1") == 0


@pytest.mark.slow
async def test_messages_with_odd_arguments_are_dropped(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    client = redis.asyncio.Redis.from_url(settings.broker.redis_url)
    key = f"{settings.broker.namespace}:ledger"
    odd: list[object] = ["not a uuid", 7, None, {}, str(uuid4())]
    for actor, argument in itertools.product(("ledger.react", "nobody.knows"), odd):
        unique = str(uuid4())
        body = {"queue_name": "ledger", "actor_name": actor, "args": [argument], "kwargs": {},
                "options": {"redis_message_id": unique}, "message_id": unique, "message_timestamp": 1}  # fmt: skip
        await client.hset(f"{key}.msgs", unique, json.dumps(body))
        await client.rpush(key, unique)
    async with working(environment, settings, tmp_path, "-p", "1", "-t", "1") as worker:
        (message_id,) = await ledger.publish()
        await until(lambda: is_state(ledger, message_id, "completed"))
    await client.aclose()
    assert not worker.says("not a uuid")


@pytest.mark.slow
async def test_the_doorbell_rings_for_an_idle_worker(
    ledger: Ledger, environment: dict[str, str], settings: Settings, own_valkey: Valkey, tmp_path: Path
) -> None:
    """A worker whose own next look is an hour away asks the broker for nothing until something is there.

    And acknowledges at once.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import service.worker.doorbell as d\n"
        "consume = d.DoorbellRedisBroker.consume\n"
        "d.DoorbellRedisBroker.consume = lambda self, queue_name, prefetch=1, timeout=0: "
        "consume(self, queue_name, prefetch=prefetch, timeout=3_600_000)\n"
    )
    environment |= {"PYTHONPATH": f"{tmp_path}:{os.curdir}", "BROKER__URL": own_valkey.url}
    settings.broker.url = SecretStr(own_valkey.url)
    async with working(environment, settings, tmp_path) as worker:
        for _ in range(3):
            looks = await until(lambda: looks_while_idle(settings))
            (message_id,) = await ledger.publish()
            await until(lambda each=message_id: is_state(ledger, each, "completed"))  # type: ignore[misc]
            assert await calls(settings) > looks
            await until(lambda: all_acknowledged(settings))
        for each in worker.children():
            each.kill()  # its consumers would listen for an hour
        worker.process.kill()


async def all_acknowledged(settings: Settings) -> bool:
    """Whether the broker counts nothing as fetched and not done."""
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        return not [key async for key in client.scan_iter(match=f"{settings.broker.namespace}:__acks__.*")]


async def calls(settings: Settings) -> int:
    """Scripts that the broker has run: what a worker fetches with, and the relay hands over with."""
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        stats = await client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))


async def looks_while_idle(settings: Settings) -> int | None:
    """How often it was asked, once nobody has asked for three seconds, in which a poller looks at least twice."""
    before = await calls(settings)
    await asyncio.sleep(3)
    return before if before and before == await calls(settings) else None


async def test_a_dead_thread_ends_the_process(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """Dramatiq would go on without it, and keep up its heartbeat."""
    script = tmp_path / "site" / "sitecustomize.py"
    script.parent.mkdir()
    script.write_text(
        "import os, threading, time\n"
        "def die():\n"
        f"    while not os.path.exists({str(tmp_path / 'now')!r}): time.sleep(0.02)\n"
        "    raise RuntimeError('a thread dies')\n"
        "import dramatiq.worker as w\n"
        "start = w.Worker.start\n"
        "def patched(self):\n"
        "    start(self); threading.Thread(target=die, daemon=True).start()\n"
        "w.Worker.start = patched\n"
    )
    environment["PYTHONPATH"] = str(script.parent)
    worker = start_worker(environment, tmp_path / "worker.log", "-p", "1", "-t", "1")
    try:
        await until(lambda: worker.says("ready for action"))
        (tmp_path / "now").touch()
        await until(lambda: worker.process.poll() is not None)
    finally:
        await worker.stop()
    assert worker.says("worker.thread_died")
    assert worker.process.returncode != 0
