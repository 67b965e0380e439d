"""From commit to effect through a real RabbitMQ, a real relay and a real worker, and what disturbs them."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, is_state
from tests.proof.ledger.working import start_worker
from tests.proof.rabbitmq.queues import count
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    import aiormq

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.conftest import Running
    from tests.proof.rabbitmq.server import Rabbitmq
    from tests.servers.processes import Started

pytestmark = pytest.mark.slow

T = 2
"""`redispatch_after` of the tests' settings, in seconds."""

RESTART = 3
"""Seconds after which Dramatiq restarts a consumer that has lost its connection."""


async def effects_of_each(ledger: Ledger) -> dict[int, int]:
    """How many messages had how many effects."""
    rows = await ledger.connection.fetch(
        """SELECT effects, count(*) FROM (
               SELECT count(effect.message_id) AS effects
               FROM outbox_message LEFT JOIN effect ON effect.message_id = outbox_message.id GROUP BY outbox_message.id
           ) AS each GROUP BY effects"""
    )
    return {row["effects"]: row["count"] for row in rows}


async def most(ledger: Ledger, column: str) -> int:
    return int(await ledger.connection.fetchval(f"SELECT max({column}) FROM outbox_message"))


async def test_every_effect_happens_once(
    ledger: Ledger, relaying: Running, worker: Started, rabbitmq: Rabbitmq
) -> None:
    async with relaying():
        for _ in range(50):
            await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: all_completed(ledger))
        assert await effects_of_each(ledger) == {1: 100}

        def acknowledged() -> bool:
            counts = rabbitmq.control("list_queues", "name", "messages").splitlines()
            return {line.split()[1] for line in counts} == {"0"}

        await until(lambda: asyncio.to_thread(acknowledged))


async def test_an_idle_worker_starts_at_once(ledger: Ledger, relaying: Running, worker: Started) -> None:
    async with relaying():
        (first,) = await ledger.publish()
        await until(lambda: is_state(ledger, first, "completed"))
        ids = []
        for _ in range(15):
            ids += await ledger.publish()
            await until(lambda: all_completed(ledger), every=0.1)
    waits = await ledger.connection.fetch(
        "SELECT extract(epoch FROM started_at - created_at)::float8 AS wait FROM outbox_message WHERE id = ANY($1)", ids
    )
    assert statistics.median(row["wait"] for row in waits) < 0.2


async def test_a_restart_of_the_broker_loses_and_burns_nothing(
    ledger: Ledger, relaying: Running, worker: Started, rabbitmq: Rabbitmq
) -> None:
    async with relaying(), publishing(ledger) as published:
        await until(lambda: len(published) > 20)
        await asyncio.to_thread(rabbitmq.restart)
        more = len(published) + 20
        await until(lambda: len(published) > more)
        published.stop()
        await until(lambda: all_completed(ledger))
    assert await effects_of_each(ledger) == {1: len(published) * 2}
    assert await most(ledger, "attempts") == 1


class publishing:  # noqa: N801  reads as a verb where it is used
    """Publishes `FannedOut` all the time; its length is how many there were."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._count = 0
        self._stopped = False

    def __len__(self) -> int:
        return self._count

    def stop(self) -> None:
        self._stopped = True

    async def _run(self) -> None:
        while not self._stopped:
            await self._ledger.publish(domain.FannedOut(subject_id=uuid4()))
            self._count += 1
            await asyncio.sleep(0.02)

    async def __aenter__(self) -> publishing:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        await self._task


async def test_closed_connections_are_opened_again(
    ledger: Ledger, relaying: Running, worker: Started, rabbitmq: Rabbitmq
) -> None:
    async with relaying():
        await ledger.publish()
        await until(lambda: all_completed(ledger))
        await asyncio.to_thread(rabbitmq.control, "close_all_connections", "for a test")
        for _ in range(5):
            await ledger.publish()
        await until(lambda: all_completed(ledger), timeout=RESTART + 60)
    assert await effects_of_each(ledger) == {1: 6}
    assert await most(ledger, "attempts") == 1


async def test_a_deleted_queue_is_back_soon_and_the_others_do_not_notice(
    ledger: Ledger, relaying: Running, worker: Started, amqp: aiormq.Channel
) -> None:
    async with relaying(), publishing(ledger) as published:
        await until(lambda: len(published) > 20)
        await amqp.queue_delete("ledger")
        before = len(published)
        began = time.monotonic()
        await until(lambda: len(published) > before + 50)
        published.stop()
        await until(lambda: done_in(ledger, "other"))
        await until(lambda: all_completed(ledger))
        assert time.monotonic() - began < T + RESTART + 40
    assert await effects_of_each(ledger) == {1: len(published) * 2}


async def done_in(ledger: Ledger, queue: str) -> bool:
    return not await ledger.connection.fetchval(
        "SELECT count(*) FROM outbox_message WHERE queue = $1 AND state <> 'completed'", queue
    )


async def test_a_memory_alarm_burns_nothing_and_the_backlog_drains(
    ledger: Ledger, relaying: Running, worker: Started, rabbitmq: Rabbitmq
) -> None:
    async with relaying():
        await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: all_completed(ledger))
        await asyncio.to_thread(rabbitmq.fill_memory)
        try:
            for _ in range(30):
                await ledger.publish(domain.FannedOut(subject_id=uuid4()))
            # One look at PostgreSQL for each probe that RabbitMQ did not answer.
            for _ in range(3):
                await until(lambda: relay_probes(ledger), every=0.001)
            assert not await all_completed(ledger)
        finally:
            await asyncio.to_thread(rabbitmq.free_memory)
        await until(lambda: all_completed(ledger))
    assert await effects_of_each(ledger) == {1: 62}
    assert await most(ledger, "attempts") == 1
    assert await most(ledger, "dispatches") <= 1


async def relay_probes(ledger: Ledger) -> bool:
    return bool(
        await ledger.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox-relay' AND query = 'SELECT 1' "
            "AND datname = current_database()"
        )
    )


async def test_a_queue_of_other_making_is_left_alone_and_the_others_flow(
    ledger: Ledger, relaying: Running, amqp: aiormq.Channel, environment: dict[str, str], tmp_path: Path
) -> None:
    await amqp.queue_declare("ledger", durable=True, arguments={"x-max-length": 5})
    async with relaying(), another_worker(environment, tmp_path):
        both = [await ledger.publish(domain.FannedOut(subject_id=uuid4())) for _ in range(10)]
        await until(lambda: done_in(ledger, "other"))
        assert [await ledger.state(refused) for refused, _ in both] == ["pending"] * 10
        assert await most(ledger, "attempts") == 1
        await amqp.queue_delete("ledger")
        await until(lambda: all_completed(ledger))
    assert await effects_of_each(ledger) == {1: 20}


class another_worker:  # noqa: N801  reads as a noun where it is used
    """A worker that starts after the test has prepared the queues."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._worker = start_worker(environment, folder / "another.log")

    async def __aenter__(self) -> Started:
        await until(lambda: self._worker.says("ready for action"))
        return self._worker

    async def __aexit__(self, *_: object) -> None:
        await self._worker.stop()


SECRET = "hunter2"

UNUSABLE: tuple[bytes | dict[str, Any], ...] = (
    b"\xff hunter2",
    b'{"hunter2',
    b"[1, 2]",
    b'{"queue_name": "ledger"}',
    {"hunter2": 1},
    {"queue_name": "elsewhere"},
    {"options": None},
    {"actor_name": []},
    {"message_id": {SECRET: 1}},
    {"kwargs": [SECRET]},
    {"actor_name": "nobody.knows", "args": [SECRET]},
    {"actor_name": "nobody.knows", "args": [], "kwargs": {SECRET: 1}},
)
"""What ends among the dead letters: bodies, or what a body has different from one that Dramatiq would make."""

ODD: tuple[dict[str, Any], ...] = (
    {"args": [SECRET]},
    {"args": SECRET},
    {"args": [{SECRET: 1}, 2]},
    {"args": [SECRET * 300_000]},
    {"args": [str(uuid4())], "kwargs": {SECRET: 1}},
    {"args": [str(uuid4())], "message_timestamp": SECRET},
    {"actor_name": "nobody.knows", "args": [str(uuid4())]},
)
"""What names no row."""


def body(fields: bytes | dict[str, Any]) -> bytes:
    if isinstance(fields, bytes):
        return fields
    usual = {"queue_name": "ledger", "actor_name": "ledger.react", "args": ["x"], "kwargs": {}, "options": {},
             "message_id": "x", "message_timestamp": 1}  # fmt: skip
    return json.dumps(usual | fields).encode()


async def test_what_cannot_run_is_set_aside_and_its_neighbours_run(
    ledger: Ledger, relaying: Running, worker: Started, amqp: aiormq.Channel
) -> None:
    async with relaying():
        await ledger.publish()
        await until(lambda: all_completed(ledger))  # so the queue is there
        for fields in (*UNUSABLE, *ODD):
            await amqp.basic_publish(body(fields), routing_key="ledger", mandatory=True)
            await ledger.publish()
        await until(lambda: all_completed(ledger))
        await until(lambda: is_count(amqp, "ledger.XQ", len(UNUSABLE)))
    assert await most(ledger, "dispatches") == 1
    assert worker.process.poll() is None
    await worker.stop()
    assert await count(amqp, "ledger") == 0
    assert not worker.says(SECRET)


async def is_count(amqp: aiormq.Channel, queue: str, expected: int) -> bool:
    return await count(amqp, queue) == expected


async def test_a_row_runs_whichever_consumer_its_message_names(
    ledger: Ledger, worker: Started, amqp: aiormq.Channel
) -> None:
    message_id = await ledger.happen()
    await amqp.basic_publish(
        body({"args": [str(message_id)], "queue_name": "cpu", "actor_name": "ledger.compute"}), routing_key="cpu"
    )
    await until(lambda: is_state(ledger, message_id, "completed"))
    assert await ledger.effects(message_id) == 1


FOREIGN_OPTIONS: tuple[dict[str, Any], ...] = (
    {"time_limit": 1},
    {"max_age": 1},
    {"on_success": "ledger.react", "pipe_target": {"queue_name": "ledger"}},
    *({"eta": 99_999_999_999_999} for _ in range(10)),
)
"""More `eta` than the worker prefetches."""


@pytest.fixture
def one_at_a_time(environment: dict[str, str]) -> None:
    """Taken before the worker: it gets the environment."""
    environment["OUTBOX__CONCURRENCY"] = "1"


@pytest.mark.parametrize("suffix", ["", ".DQ"])
async def test_options_in_a_body_reach_no_delivery(
    one_at_a_time: None, ledger: Ledger, worker: Started, amqp: aiormq.Channel, suffix: str
) -> None:
    ids = [await ledger.happen("slower") for _ in FOREIGN_OPTIONS]
    queue = f"ledger{suffix}"
    for message_id, options in zip(ids, FOREIGN_OPTIONS, strict=True):
        fields = {"args": [str(message_id)], "queue_name": queue, "options": options}
        await amqp.basic_publish(body(fields), routing_key=queue, mandatory=True)
    await until(lambda: all_completed(ledger))
    assert await most(ledger, "attempts") == 1


@pytest.fixture
def quorum(settings: Settings, environment: dict[str, str]) -> None:
    """Taken before the worker: it gets the environment."""
    settings.broker.quorum_queues = True
    environment["BROKER__QUORUM_QUEUES"] = "true"


async def test_quorum_queues(
    quorum: None, ledger: Ledger, relaying: Running, worker: Started, rabbitmq: Rabbitmq
) -> None:
    async with relaying():
        for _ in range(20):
            await ledger.publish()
        await until(lambda: all_completed(ledger))
    listed = await asyncio.to_thread(rabbitmq.control, "list_queues", "name", "type")
    kinds = dict(line.split() for line in listed.splitlines())
    assert (kinds["ledger"], kinds["ledger.DQ"], kinds["ledger.XQ"]) == ("quorum", "quorum", "quorum")
