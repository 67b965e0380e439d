"""What the modules of `service/worker/` take for granted of the installed Dramatiq.

Each test is about stock Dramatiq alone. One that fails after an upgrade says what those modules must do differently.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import threading
from queue import Empty, PriorityQueue
from typing import TYPE_CHECKING, Any

import dramatiq
import dramatiq.worker
import pytest
import redis
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread
from dramatiq.broker import Broker, Consumer, MessageProxy
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.brokers.stub import StubBroker
from dramatiq.errors import ActorNotFound, BrokerConnectionError, ConnectionClosed, DecodeError
from dramatiq.middleware import AsyncIO, CurrentMessage, Middleware
from dramatiq.middleware.threading import Interrupt
from pydantic import SecretStr

from service.settings import BrokerSettings
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from dramatiq.worker import ConsumerThread

QUEUE = "ledger"


@pytest.fixture
def stock(broker_url: str, broker_namespace: str) -> Iterator[RedisBroker]:
    client = redis.Redis.from_url(BrokerSettings(url=SecretStr(broker_url)).redis_url)
    yield RedisBroker(client=client, namespace=broker_namespace, middleware=[], maintenance_chance=0)
    client.close()


class Keys:
    """A queue's keys, as `doorbell.py`, the relay and the chaos suite spell them."""

    def __init__(self, broker: RedisBroker, queue: str = QUEUE) -> None:
        self.ids = f"{broker.namespace}:{queue}"
        self.bodies = f"{self.ids}.msgs"
        self.dead = f"{broker.namespace}:{QUEUE}.XQ"
        self.dead_bodies = f"{self.dead}.msgs"
        self.acks = f"{broker.namespace}:__acks__.{broker.broker_id}.{queue}"


def send(broker: Broker, delay: int | None = None) -> dramatiq.Message[None]:
    return broker.enqueue(dramatiq.Message(QUEUE, "any.actor", (), {}, {}), delay=delay)


def unique(message: dramatiq.Message[None]) -> str:
    found: str = message.options["redis_message_id"]
    return found


def test_a_message_is_an_id_in_a_list_and_a_body_in_a_hash(stock: RedisBroker) -> None:
    sent, keys = send(stock), Keys(stock)
    assert stock.client.lrange(keys.ids, 0, -1) == [unique(sent).encode()]
    assert stock.client.hgetall(keys.bodies) == {unique(sent).encode(): sent.encode()}


def test_a_fetch_has_the_bodies_in_order_and_none_for_one_that_is_gone(stock: RedisBroker) -> None:
    sent, keys = [send(stock) for _ in range(3)], Keys(stock)
    stock.client.hdel(keys.bodies, unique(sent[1]))
    assert stock.do_fetch(QUEUE, 10) == [sent[0].encode(), None, sent[2].encode()]
    assert stock.client.smembers(keys.acks) == {unique(each).encode() for each in sent}
    assert stock.do_fetch(QUEUE, 10) == []


def test_a_requeue_gives_back_what_is_unacknowledged_and_has_a_body(stock: RedisBroker) -> None:
    kept, bodiless, done = (send(stock) for _ in range(3))
    keys = Keys(stock)
    stock.do_fetch(QUEUE, 10)
    stock.client.hdel(keys.bodies, unique(bodiless))
    stock.do_ack(QUEUE, unique(done))
    for _ in range(2):
        stock.do_requeue(QUEUE, unique(kept), unique(bodiless), unique(done), "never seen")
        assert stock.client.lrange(keys.ids, 0, -1) == [unique(kept).encode()]
        assert not stock.client.exists(keys.acks)


@pytest.mark.parametrize("delay", [None, 1])
def test_an_ack_forgets_and_a_nack_keeps_and_both_can_be_repeated(stock: RedisBroker, delay: int | None) -> None:
    done, dead = send(stock, delay), send(stock, delay)
    keys = Keys(stock, done.queue_name)
    stock.do_fetch(done.queue_name, 10)
    for _ in range(2):
        stock.do_ack(done.queue_name, unique(done))
        stock.do_nack(dead.queue_name, unique(dead))
        assert not stock.client.exists(keys.ids, keys.bodies, keys.acks)
        assert stock.client.zrange(keys.dead, 0, -1) == [unique(dead).encode()]
        assert stock.client.hgetall(keys.dead_bodies) == {unique(dead).encode(): dead.encode()}


def test_a_delayed_message_is_in_a_queue_of_its_own_and_says_when(stock: RedisBroker) -> None:
    sent = send(stock, 1_000)
    assert sent.queue_name == f"{QUEUE}.DQ"
    assert isinstance(json.loads(sent.encode())["options"]["eta"], int)
    assert stock.client.llen(Keys(stock, sent.queue_name).ids) == 1


def test_maintenance_gives_back_what_a_dead_process_had(stock: RedisBroker) -> None:
    sent, keys = send(stock), Keys(stock)
    stock.do_fetch(QUEUE, 1)
    stock.client.zadd(f"{stock.namespace}:__heartbeats__", {stock.broker_id: 1})
    heir = RedisBroker(client=stock.client, namespace=stock.namespace, middleware=[], maintenance_chance=1_000_000)
    assert heir.do_fetch(QUEUE, 1) == [sent.encode()]
    assert not stock.client.exists(keys.acks)


def test_a_message_has_seven_fields_and_its_options_can_be_changed() -> None:
    message: dramatiq.Message[None] = dramatiq.Message(QUEUE, "any.actor", (), {}, {"eta": 1, "other": 2})
    assert [each.name for each in dataclasses.fields(message)] == [
        "queue_name", "actor_name", "args", "kwargs", "options", "message_id", "message_timestamp",
    ]  # fmt: skip
    proxy = MessageProxy(message)
    del proxy.options["eta"]
    assert proxy.asdict()["options"] == message.options == {"other": 2}


@pytest.mark.parametrize("body", [b"\xff", b"{", b"null", b"[]", b'{"args": []}', b'{"options": 3}'])
def test_whatever_cannot_be_decoded_is_one_kind_of_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        dramatiq.Message.decode(body)


class Scripted(Consumer):
    """Hands out messages, then fails as it is told to; it notes what is asked of it."""

    def __init__(self, script: list[Any], asked: list[str]) -> None:
        self._script = script
        self._asked = asked

    def __next__(self) -> MessageProxy | None:
        if not self._script:
            return None
        step = self._script.pop(0)
        if isinstance(step, Exception):
            raise step
        return MessageProxy(step)

    def ack(self, message: MessageProxy) -> None:
        self._asked.append("ack")

    def nack(self, message: MessageProxy) -> None:
        self._asked.append("nack")

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        self._asked.append(f"requeue {len(list(messages))}")

    def close(self) -> None:
        self._asked.append("close")


class ScriptedBroker(StubBroker):
    """Whose only consumer of messages is scripted."""

    def __init__(self, script: list[Any]) -> None:
        super().__init__(middleware=[CurrentMessage()])
        self.asked: list[str] = []
        self.consumed: list[dict[str, Any]] = []
        self._script = script

    def consume(self, **arguments: Any) -> Consumer:  # type: ignore[override]
        self.consumed.append(arguments)
        return Scripted(self._script if arguments["queue_name"] == QUEUE else [], self.asked)


def message(**options: Any) -> dramatiq.Message[None]:
    return dramatiq.Message(QUEUE, "any.actor", (), {}, options)


def work(broker: ScriptedBroker, done: Callable[[dramatiq.Worker], Any]) -> None:
    worker = dramatiq.Worker(broker, worker_timeout=50, worker_threads=1)
    worker.start()
    try:
        until_sync(lambda: done(worker))
    finally:
        worker.stop()


def declare(broker: Broker, fn: Callable[[], None]) -> None:
    dramatiq.Actor(fn, broker=broker, actor_name="any.actor", queue_name=QUEUE, priority=0, options={})


def test_a_worker_asks_for_a_consumer_of_each_queue_and_its_delay_queue() -> None:
    broker = ScriptedBroker([message()])
    ran: list[int] = []
    declare(broker, lambda: ran.append(1))
    work(broker, lambda _: ran)
    assert {each["queue_name"] for each in broker.consumed} == {QUEUE, f"{QUEUE}.DQ"}
    assert {(each["prefetch"], each["timeout"]) for each in broker.consumed} == {(2, 50)}
    assert [each for each in broker.asked if each != "requeue 0"] == ["ack", "close", "close"]


@pytest.mark.slow
def test_an_eta_keeps_a_message_in_memory_and_an_ended_connection_forgets_it() -> None:
    """So it is no thread's, and has to go back into the queue with the next consumer."""
    broker = ScriptedBroker([message(eta=99_999_999_999_999)])
    declare(broker, lambda: None)

    def forgotten(worker: dramatiq.Worker) -> bool:
        consumer: ConsumerThread = worker.consumers[QUEUE]
        if consumer.delay_queue.qsize():
            broker._script.append(ConnectionClosed("for a test"))
        return len(broker.consumed) > 2 and not consumer.delay_queue.qsize()

    work(broker, forgotten)
    assert "requeue 1" not in broker.asked
    assert issubclass(ConnectionClosed, BrokerConnectionError)


def test_a_message_that_its_actor_fails_is_refused() -> None:
    broker = ScriptedBroker([message()])
    declare(broker, lambda: CurrentMessage.get_current_message().fail())  # type: ignore[union-attr]
    work(broker, lambda _: "nack" in broker.asked)


def test_an_unknown_actor_is_looked_up_by_get_actor() -> None:
    broker = ScriptedBroker([])
    with pytest.raises(ActorNotFound):
        broker.get_actor("nobody.knows")
    assert broker.actors == {}


def test_hooks_run_in_order_before_and_in_reverse_after() -> None:
    heard: list[str] = []

    class Heard(Middleware):
        def __init__(self, name: str) -> None:
            self._name = name

        def before_worker_boot(self, broker: Broker, worker: Any) -> None:
            heard.append(f"before {self._name}")

        def after_worker_shutdown(self, broker: Broker, worker: Any) -> None:
            heard.append(f"after {self._name}")

    broker = Broker(middleware=[])
    broker.middleware += [Heard("a"), Heard("b")]
    broker.emit_before("worker_boot", None)
    broker.emit_after("worker_shutdown", None)
    assert heard == ["before a", "before b", "after b", "after a"]


def test_the_loop_of_its_thread_can_be_replaced_before_it_starts() -> None:
    async def where() -> int:
        return threading.get_ident()

    thread = EventLoopThread(logging.getLogger())
    assert not thread.loop.is_running()
    thread.start(timeout=5)
    set_event_loop_thread(thread)
    try:
        assert get_event_loop_thread() is thread
        assert thread.run_coroutine(where()) == thread.ident
    finally:
        AsyncIO().after_worker_shutdown(Broker(middleware=[]), None)
    assert get_event_loop_thread() is None
    assert issubclass(dramatiq.middleware.TimeLimitExceeded, Interrupt)


def test_rabbitmqs_queues_are_declared_by_a_method_each() -> None:
    """And those beside a queue after it, so that what refuses them need not be its end."""
    declared: list[str] = []

    class Listening(RabbitmqBroker):
        def _declare_queue(self, queue_name: str) -> None:
            declared.append(queue_name)

        def _declare_dq_queue(self, queue_name: str) -> None:
            declared.append(f"{queue_name}.DQ")

        def _declare_xq_queue(self, queue_name: str) -> None:
            declared.append(f"{queue_name}.XQ")

    broker = Listening(url="amqp://nowhere", middleware=[])
    broker.declare_queue(QUEUE, ensure=True)
    assert declared == [QUEUE, f"{QUEUE}.DQ", f"{QUEUE}.XQ"]
    assert not broker.queues_pending


def test_rabbitmqs_queues_are_declared_from_one_set_of_arguments() -> None:
    broker = RabbitmqBroker(url="amqp://nowhere", middleware=[], confirm_delivery=True)
    assert broker._build_queue_arguments(QUEUE) == {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{QUEUE}.XQ",
    }
    assert isinstance(inspect.getattr_static(broker, "channel"), property)
    assert inspect.getattr_static(broker, "connection").fdel is not None


class Bench(dramatiq.worker.WorkerThread):
    """Takes its place among a worker's threads, and what goes past their queue."""

    def __init__(self, worker: dramatiq.Worker) -> None:
        super().__init__(
            broker=worker.broker, consumers=worker.consumers, work_queue=worker.work_queue, worker_timeout=1
        )
        self.heard: list[str] = []
        self.items: list[Any] = []

    def run(self) -> None:
        until_sync(lambda: "stop" in self.heard)
        until_sync(lambda: len(self.items) == 2)
        self.heard.append("over")

    def stop(self) -> None:
        self.heard.append("stop")


def test_a_worker_can_be_given_another_queue_and_one_more_thread() -> None:
    """It is stopped and waited for like the others; then the queue is emptied by `get_nowait`, and that given back."""
    broker = ScriptedBroker([message(), message()])
    declare(broker, lambda: None)
    bench: list[Bench] = []

    class Past(PriorityQueue[Any]):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            bench[0].items.append(item)

        def get_nowait(self) -> Any:
            assert bench[0].heard == ["stop", "over"]
            if not bench[0].items:
                raise Empty
            item = bench[0].items.pop()
            assert (item.priority, item.message.queue_name) == (0, QUEUE)
            return item

    class Booting(Middleware):
        def before_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
            worker.work_queue = Past()
            bench.append(Bench(worker))
            bench[0].start()

        def after_worker_boot(self, broker: Broker, worker: dramatiq.Worker) -> None:
            worker.workers.append(bench[0])

    broker.add_middleware(Booting())
    work(broker, lambda _: len(bench[0].items) == 2)
    assert "requeue 2" in broker.asked


def test_a_threads_work_is_told_to_the_consumer_by_post_process_message() -> None:
    broker = ScriptedBroker([])
    declare(broker, lambda: None)

    def settled(worker: dramatiq.Worker) -> bool:
        done, refused = MessageProxy(message()), MessageProxy(message())
        refused.fail()
        if worker.consumers[QUEUE].consumer is None:
            return False
        for each in (done, refused):
            worker.consumers[QUEUE].post_process_message(each)
        return True

    work(broker, settled)
    assert broker.asked[:2] == ["ack", "nack"]
