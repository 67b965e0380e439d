"""Faults that the scenarios found, each pinned down where it can be seen at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest
import redis
from dramatiq.message import Message

from service.outbox.running.failures import lost_database
from service.outbox.running.heartbeat import Heartbeat
from service.worker import build
from service.worker.doorbell import DoorbellRedisBroker
from tests.proof.chaos import domain  # noqa: F401  registers the consumers
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.database.driver import Connection
    from service.dev.valkey import Valkey
    from service.settings import Settings

pytestmark = pytest.mark.slow

BROKEN = asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")


async def test_a_heartbeat_outlives_a_connection_that_breaks_while_it_is_used(database_url: str) -> None:
    attempts: Iterator[int] = iter(range(100))
    connected = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def connect() -> Connection:
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


@pytest.mark.parametrize("refusal", [("maxmemory", "1"), ("min-replicas-to-write", "1")])
def test_an_acknowledgement_that_the_broker_refuses_keeps_no_place_occupied(
    own_valkey: Valkey, refusal: tuple[str, str]
) -> None:
    """Otherwise a worker that met a full broker a few times would fetch nothing any more."""
    broker = DoorbellRedisBroker(own_valkey.url, namespace="mended", middleware=[])
    broker.declare_queue("queue")
    first: Message[None] = Message(queue_name="queue", actor_name="first", args=(), kwargs={}, options={})
    second: Message[None] = Message(queue_name="queue", actor_name="second", args=(), kwargs={}, options={})
    broker.enqueue(first)
    consumer = broker.consume("queue", prefetch=1, timeout=2_000)
    message = next(consumer)
    assert message is not None
    name, value = refusal
    broker.client.config_set(name, value)
    with pytest.raises(redis.ResponseError):
        broker.do_ack("queue", message.options["redis_message_id"])
    consumer.ack(message)
    broker.client.config_set(name, "0")
    broker.enqueue(second)
    found = next(consumer)
    assert found is not None
    assert found.actor_name == "second"
    consumer.close()
    broker.close()


def test_what_was_fetched_by_a_connection_that_broke_is_fetched_again(own_valkey: Valkey) -> None:
    """And what a thread of this process runs is not."""
    broker = DoorbellRedisBroker(own_valkey.url, namespace="mended", middleware=[])
    broker.declare_queue("queue")
    for name in ("first", "second"):
        broker.enqueue(Message(queue_name="queue", actor_name=name, args=(), kwargs={}, options={}))
    broker.do_fetch("queue", 1)  # the reply that never arrives
    consumer = broker.consume("queue", prefetch=4, timeout=500)
    found = [next(consumer), next(consumer)]
    assert {each.actor_name for each in found if each is not None} == {"first", "second"}
    consumer.close()
    heir = broker.consume("queue", prefetch=4, timeout=100)
    assert next(heir) is None
    heir.close()
    broker.close()


def test_of_what_was_fetched_only_the_undecodable_is_set_aside(own_valkey: Valkey) -> None:
    broker = DoorbellRedisBroker(own_valkey.url, namespace="mended", middleware=[])
    broker.declare_queue("queue")
    broker.client.hset("mended:queue.msgs", "bad", "{}")
    broker.client.rpush("mended:queue", "bad")
    for number in range(20):
        broker.enqueue(Message(queue_name="queue", actor_name=f"{number}", args=(), kwargs={}, options={}))
    consumer = broker.consume("queue", prefetch=21, timeout=500)
    found = [next(consumer) for _ in range(20)]
    assert [each.actor_name for each in found if each is not None] == [f"{number}" for number in range(20)]
    assert broker.client.hkeys("mended:queue.XQ.msgs") == [b"bad"]
    consumer.close()
    broker.close()


@pytest.mark.parametrize("arguments", [(), ("secret",), (None,), ({"a": "secret"},), ("a", "b")])
def test_a_message_that_no_relay_wrote_is_not_logged(
    settings: Settings, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...]
) -> None:
    """Dramatiq logs the whole message when its actor raises."""
    actor = build(settings).get_actor("chaos.book")
    assert actor.fn(*arguments) is None
    out, errors = capsys.readouterr()
    assert "worker.odd_message" in out + errors
    assert "secret" not in out + errors
