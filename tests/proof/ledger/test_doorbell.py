"""The worker's broker on Valkey, taken by itself: nothing fetched is stranded, nobody waits for a poll."""

from __future__ import annotations

import random
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dramatiq
import pytest
from dramatiq.middleware import Retries

from service.worker.doorbell import DoorbellRedisBroker
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dramatiq.broker import Consumer, MessageProxy

    from service.dev.valkey import Valkey

QUEUE = "queue"


def connect(valkey: Valkey) -> DoorbellRedisBroker:
    """One process's broker."""
    broker = DoorbellRedisBroker(valkey.url, namespace="bell", middleware=[Retries(max_retries=0)])
    broker.declare_queue(QUEUE)
    return broker


@pytest.fixture
def broker(own_valkey: Valkey) -> DoorbellRedisBroker:
    return connect(own_valkey)


def send(broker: DoorbellRedisBroker) -> None:
    message: dramatiq.Message[None] = dramatiq.Message(QUEUE, "any.actor", (), {}, {})
    broker.enqueue(message)


def take(consumer: Consumer, within: float = 60) -> MessageProxy:
    message = until_sync(lambda: next(consumer), timeout=within, what="a message")
    assert message is not None
    return message


def unacknowledged(broker: DoorbellRedisBroker) -> int:
    count: int = broker.client.scard(f"bell:__acks__.{broker.broker_id}.{QUEUE}")
    return count


def refusals(broker: DoorbellRedisBroker) -> int:
    """How often the server answered that it is full."""
    errors: dict[str, dict[str, int]] = broker.client.info("errorstats")
    return errors.get("errorstat_OOM", {}).get("count", 0)


@contextmanager
def working(broker: DoorbellRedisBroker) -> Iterator[dramatiq.Worker]:
    """A Dramatiq worker on the broker."""
    worker = dramatiq.Worker(broker, worker_timeout=200, worker_threads=2)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def declare(broker: DoorbellRedisBroker, fn: Any) -> dramatiq.Actor[Any, Any]:
    return dramatiq.Actor(fn, broker=broker, actor_name="any.actor", queue_name=QUEUE, priority=0, options={})


def cut_connections(valkey: Valkey) -> None:
    client = connect(valkey).client
    client.execute_command("CLIENT", "KILL", "TYPE", "normal")
    client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    client.close()


@pytest.mark.slow
def test_a_delayed_message_outlives_a_cut_connection(broker: DoorbellRedisBroker, own_valkey: Valkey) -> None:
    """Dramatiq forgets what it delays, and the ids would lie in the acks for as long as the process lives."""
    ran: list[int] = []
    actor = declare(broker, lambda: ran.append(1))
    with working(broker) as worker:
        actor.send_with_options(delay=2_000)
        until_sync(lambda: f"{QUEUE}.DQ" in worker.consumers)
        until_sync(lambda: worker.consumers[f"{QUEUE}.DQ"].delay_queue.qsize() == 1)
        cut_connections(own_valkey)
        until_sync(lambda: ran)
    assert ran == [1]


def test_the_messages_of_a_dead_process_are_found_on_an_idle_queue(
    broker: DoorbellRedisBroker, own_valkey: Valkey
) -> None:
    """Within some two hundred looks, of which an idle worker has one a second: stock Dramatiq has about a thousand."""
    send(broker)
    take(broker.consume(QUEUE, prefetch=1))
    two_minutes_ago = time.time() * 1000 - 120_000
    broker.client.zadd("bell:__heartbeats__", {broker.broker_id: two_minutes_ago})
    random.seed(1)
    heir = connect(own_valkey).consume(QUEUE, prefetch=1, timeout=1)
    assert any(next(heir) for _ in range(200))


@pytest.mark.slow
def test_a_delivery_that_the_server_heard_nothing_of_is_not_run_again(broker: DoorbellRedisBroker) -> None:
    ran: list[int] = []
    ended = threading.Event()

    def run() -> None:
        ran.append(1)
        ended.wait(20)

    actor = declare(broker, run)
    with working(broker):
        actor.send()
        until_sync(lambda: ran)
        broker.client.config_set("maxmemory", 1)
        ended.set()
        until_sync(lambda: refusals(broker) >= 2, what="the refused fetch and acknowledgement")
        broker.client.config_set("maxmemory", 0)
        until_sync(lambda: not unacknowledged(broker))
    assert ran == [1]
    assert not broker.client.exists(f"bell:{QUEUE}", f"bell:{QUEUE}.msgs")


def test_ids_without_bodies_are_passed_over_at_once(broker: DoorbellRedisBroker) -> None:
    """Their hash was deleted or evicted; the relay counts the ids as a full queue."""
    broker.client.rpush(f"bell:{QUEUE}", *range(3_000))
    send(broker)
    take(broker.consume(QUEUE, prefetch=4, timeout=500))


def test_a_message_given_back_wakes_a_waiting_consumer(broker: DoorbellRedisBroker, own_valkey: Valkey) -> None:
    send(broker)
    stopping = broker.consume(QUEUE, prefetch=1)
    message = take(stopping)
    other = connect(own_valkey)
    found: list[MessageProxy | None] = []
    waiting = threading.Thread(target=lambda: found.append(next(other.consume(QUEUE, prefetch=1, timeout=60_000))))
    waiting.start()
    until_sync(lambda: broker.client.zscore("bell:__heartbeats__", other.broker_id), what="its first look")
    stopping.requeue([message])
    waiting.join(50)
    assert [each and each.message_id for each in found] == [message.message_id]


def test_a_consumer_is_closed_while_its_thread_still_listens(broker: DoorbellRedisBroker) -> None:
    """A worker's patience with its threads may be over first. What they still run is acknowledged all the same."""
    send(broker)
    consumer = broker.consume(QUEUE, prefetch=4, timeout=60_000)
    message = take(consumer)
    outcomes: list[MessageProxy | Exception | None] = []

    def listen() -> None:
        try:
            outcomes.append(next(consumer))
        except Exception as error:  # noqa: BLE001  whatever it is, Dramatiq would log it as unexpected
            outcomes.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    until_sync(lambda: consumer._absent, what="its thread to listen")  # type: ignore[attr-defined]
    consumer.close()
    send(broker)
    thread.join(50)
    assert outcomes == [None]
    assert broker.client.llen(f"bell:{QUEUE}") == 1
    consumer.ack(message)
    assert unacknowledged(broker) == 0


def test_a_consumer_that_is_closed_while_it_fetches_gives_back_what_it_got(
    broker: DoorbellRedisBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(broker)
    consumer = broker.consume(QUEUE, prefetch=4)
    fetch = broker.do_fetch

    def fetch_and_close(*arguments: Any) -> Any:
        bodies = fetch(*arguments)
        consumer.close()
        return bodies

    monkeypatch.setattr(broker, "do_fetch", fetch_and_close)
    assert next(consumer) is None
    assert broker.client.llen(f"bell:{QUEUE}") == 1


def test_a_consumer_that_ends_gives_back_what_no_thread_was_handed(broker: DoorbellRedisBroker) -> None:
    for _ in range(4):
        send(broker)
    consumer = broker.consume(QUEUE, prefetch=4)
    message = take(consumer)
    assert unacknowledged(broker) == 4
    consumer.close()
    assert broker.client.llen(f"bell:{QUEUE}") == 3
    consumer.ack(message)
    assert unacknowledged(broker) == 0
