"""Beside the ledger's consumers, an actor of the user's own is run as Dramatiq documents it, on either broker."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import dramatiq
import pika
import pytest
import redis
from dramatiq.middleware import AgeLimit, Callbacks, CurrentMessage, Pipelines, Retries, TimeLimit
from pydantic import SecretStr

from service.settings import BrokerSettings
from service.worker.doorbell import DoorbellRedisBroker
from service.worker.dramatiq_broker import make_broker
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dramatiq.broker import Broker

    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow

QUEUE = "ledger"


class Push(Protocol):
    """Pushes a body as Dramatiq's would be, but for its options, without Dramatiq."""

    def __call__(self, actor: str, **options: Any) -> None: ...


@pytest.fixture(params=["redis", "rabbitmq"])
def broker_settings(request: pytest.FixtureRequest) -> BrokerSettings:
    if request.param == "redis":
        url, namespace = request.getfixturevalue("broker_url"), request.getfixturevalue("broker_namespace")
        return BrokerSettings(url=SecretStr(url), namespace=namespace)
    rabbitmq: Rabbitmq = request.getfixturevalue("rabbitmq")
    return BrokerSettings(url=SecretStr(rabbitmq.url))


@pytest.fixture
def broker(broker_settings: BrokerSettings) -> Iterator[Broker]:
    """The worker's broker; its queue is declared."""
    middleware = [AgeLimit(), TimeLimit(interval=50), Callbacks(), Pipelines(), Retries(), CurrentMessage()]
    broker = make_broker(broker_settings, middleware)
    broker.declare_queue(QUEUE)
    broker.emit_after("process_boot")
    yield broker
    broker.close()


@pytest.fixture
def push(broker: Broker, broker_settings: BrokerSettings) -> Push:
    def push(actor: str, **options: Any) -> None:
        unique = str(uuid4())
        fields = {"queue_name": QUEUE, "actor_name": actor, "args": [], "kwargs": {}, "message_id": unique,
                  "options": {"redis_message_id": unique, **options}, "message_timestamp": 1}  # fmt: skip
        body = json.dumps(fields).encode()
        if isinstance(broker, DoorbellRedisBroker):
            with redis.Redis.from_url(broker_settings.redis_url) as client:
                client.hset(f"{broker_settings.namespace}:{QUEUE}.msgs", unique, body)
                client.rpush(f"{broker_settings.namespace}:{QUEUE}", unique)
        else:
            broker.declare_queue(QUEUE, ensure=True)  # type: ignore[call-arg]
            with pika.BlockingConnection(pika.URLParameters(broker_settings.url.get_secret_value())) as connection:
                connection.channel().basic_publish("", QUEUE, body)

    return push


@contextmanager
def working(broker: Broker, threads: int = 2) -> Iterator[None]:
    """A Dramatiq worker on the broker."""
    worker = dramatiq.Worker(broker, worker_timeout=200, worker_threads=threads)
    worker.start()
    try:
        yield
    finally:
        worker.stop()


def declare(broker: Broker, fn: Any, **options: Any) -> dramatiq.Actor[Any, Any]:
    return dramatiq.Actor(
        fn, broker=broker, actor_name="plain.actor", queue_name=QUEUE, priority=0, options={"max_retries": 0, **options}
    )


def test_a_delay_is_kept(broker: Broker) -> None:
    ran: list[float] = []
    actor = declare(broker, lambda: ran.append(time.monotonic()))
    with working(broker):
        sent = time.monotonic()
        actor.send_with_options(delay=1_500)
        until_sync(lambda: ran)
    assert ran[0] - sent >= 1.5


def test_a_retry_is_kept(broker: Broker) -> None:
    ran: list[int] = []

    def fail() -> None:
        ran.append(CurrentMessage.get_current_message().options.get("retries", 0))  # type: ignore[union-attr]
        raise RuntimeError("the first and the second time")

    actor = declare(broker, fail)
    with working(broker):
        actor.send_with_options(max_retries=1, min_backoff=100)
        until_sync(lambda: len(ran) == 2)
    assert ran == [0, 1]


def test_a_message_has_its_own_time_limit_and_callback(broker: Broker) -> None:
    ended: list[str] = []

    def last() -> None:
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)
        except dramatiq.middleware.TimeLimitExceeded:
            ended.append("limited")
            raise

    actor = declare(broker, last)
    dramatiq.Actor(
        lambda *_: ended.append("called back"),
        broker=broker, actor_name="plain.callback", queue_name=QUEUE, priority=0, options={},
    )  # fmt: skip
    with working(broker):
        actor.send_with_options(time_limit=100, on_failure="plain.callback")
        until_sync(lambda: len(ended) == 2)
    assert ended == ["limited", "called back"]


def test_an_eta_outside_the_delay_queue_takes_no_place(broker: Broker, push: Push) -> None:
    """Dramatiq never sends one there; a few would leave no room for the others."""
    ran: list[int] = []
    actor = declare(broker, lambda: ran.append(1))
    for _ in range(6):
        push("plain.actor", eta=99_999_999_999_999)
    with working(broker):
        actor.send()
        until_sync(lambda: len(ran) == 7)
