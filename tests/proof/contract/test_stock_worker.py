"""An unmodified Dramatiq worker runs what the relay hands over, and nothing of it stays behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

import dramatiq
import pytest
import redis
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import default_middleware
from pydantic import SecretStr

from relay.brokers import make_sender
from service.ledger.message import DueDelivery
from service.settings import BrokerSettings
from service.worker.dramatiq_broker import make_broker
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import aiormq
    from dramatiq.broker import Broker

    from relay.brokers.sender import Sender
    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Stock(Protocol):
    """One kind of broker, with stock Dramatiq on it."""

    settings: BrokerSettings
    broker: Broker

    async def bodies(self) -> list[bytes]:
        """The bodies that wait in the queue; they stay there."""

    async def remains(self) -> dict[str, int]:
        """What is left of messages, wherever Dramatiq keeps any, by place."""


class StockRedis:
    def __init__(self, settings: BrokerSettings) -> None:
        self.settings = settings
        self.client = redis.Redis.from_url(settings.redis_url)
        self.broker: Broker = RedisBroker(
            client=self.client, namespace=settings.namespace, middleware=stock_middleware()
        )

    async def bodies(self) -> list[bytes]:
        key = f"{self.settings.namespace}:ledger"
        ids: list[bytes] = self.client.lrange(key, 0, -1)  # type: ignore[assignment]
        return [self.client.hget(f"{key}.msgs", each.decode()) for each in ids]  # type: ignore[misc]

    async def remains(self) -> dict[str, int]:
        left = {}
        for key in self.client.scan_iter(match=f"{self.settings.namespace}:*"):
            match self.client.type(key):
                case b"list":
                    left[key.decode()] = self.client.llen(key)
                case b"hash":
                    left[key.decode()] = self.client.hlen(key)
                case b"set":
                    left[key.decode()] = self.client.scard(key)
        return left


class StockRabbitmq:
    def __init__(self, settings: BrokerSettings, amqp: aiormq.Channel) -> None:
        self.settings = settings
        self.amqp = amqp
        url = settings.url.get_secret_value()
        self.broker: Broker = RabbitmqBroker(url=url, middleware=stock_middleware())

    async def bodies(self) -> list[bytes]:
        found = []
        while (message := await self.amqp.basic_get("ledger")).message_count is not None:
            found.append(message)
        for message in found:
            assert message.delivery_tag is not None
            await self.amqp.basic_nack(message.delivery_tag)
        return [message.body for message in found]

    async def remains(self) -> dict[str, int]:
        names = ("ledger", "ledger.DQ", "ledger.XQ")
        return {name: (await self.amqp.queue_declare(name, passive=True)).message_count or 0 for name in names}


def stock_middleware() -> list[dramatiq.Middleware]:
    """What Dramatiq adds itself, without the optional ones that listen on ports."""
    return [each() for each in default_middleware if each.__name__ != "Prometheus"]


@pytest.fixture(params=["redis", "rabbitmq"])
def stock(request: pytest.FixtureRequest) -> Iterator[Stock]:
    """Each kind of broker in turn."""
    if request.param == "redis":
        url, namespace = request.getfixturevalue("broker_url"), request.getfixturevalue("broker_namespace")
        found: Stock = StockRedis(BrokerSettings(url=SecretStr(url), namespace=namespace))
    else:
        rabbitmq: Rabbitmq = request.getfixturevalue("rabbitmq")
        settings = BrokerSettings(url=SecretStr(rabbitmq.url))
        found = StockRabbitmq(settings, request.getfixturevalue("amqp"))
    yield found
    found.broker.close()


@pytest.fixture
async def sender(stock: Stock) -> AsyncIterator[Sender]:
    sender = make_sender(stock.settings)
    yield sender
    await sender.close()


def batch(size: int = 20) -> list[DueDelivery]:
    return [DueDelivery(str(uuid4()), "plain.record", TRACE if number % 2 else None) for number in range(size)]


async def test_each_body_equals_the_message_that_it_decodes_to(stock: Stock, sender: Sender) -> None:
    rows = batch()
    await sender.hand_over("ledger", rows, "t")
    bodies = await stock.bodies()
    bodies = sorted(bodies, key=lambda body: [row.delivery_id for row in rows].index(json.loads(body)["message_id"]))
    assert [json.loads(body)["message_id"] for body in bodies] == [row.delivery_id for row in rows]
    for body, row in zip(bodies, rows, strict=True):
        message: dramatiq.Message[None] = dramatiq.Message.decode(body)
        assert (message.queue_name, message.actor_name) == ("ledger", "plain.record")
        assert (message.args, message.kwargs) == ((row.delivery_id,), {})
        assert message.options.get("traceparent") == row.trace
        assert message.encode() == body


@pytest.mark.parametrize("first", ["the worker", "the relay"])
async def test_a_stock_worker_runs_each_message_once_and_nothing_remains(
    stock: Stock, sender: Sender, first: str
) -> None:
    """Whoever comes first declares the queues; the other must find them to be what it would have declared."""
    ran: list[str] = []
    dramatiq.Actor(
        ran.append, broker=stock.broker, actor_name="plain.record", queue_name="ledger", priority=0, options={}
    )
    rows = batch()
    if first == "the relay":
        await sender.hand_over("ledger", rows, "t")
    worker = dramatiq.Worker(stock.broker, worker_timeout=100, worker_threads=2)
    worker.start()
    try:
        if first == "the worker":
            await sender.hand_over("ledger", rows, "t")
        await until(lambda: len(ran) >= len(rows))
    finally:
        # What is not acknowledged by then goes back into its queue.
        worker.stop()
    assert sorted(ran) == sorted(row.delivery_id for row in rows)
    assert sum((await stock.remains()).values()) == 0


@pytest.mark.parametrize("quorum", [False, True], ids=["classic", "quorum"])
@pytest.mark.parametrize("first", ["the worker", "the relay"])
async def test_relay_and_worker_declare_the_same_queues(rabbitmq: Rabbitmq, quorum: bool, first: str) -> None:
    settings = BrokerSettings(url=SecretStr(rabbitmq.url), quorum_queues=quorum)
    broker, sender = make_broker(settings, []), make_sender(settings)
    try:
        if first == "the worker":
            broker.consume("ledger", timeout=100).close()
        await sender.hand_over("ledger", batch(1), "t")
        consumer = broker.consume("ledger", timeout=100)
        await until(lambda: next(consumer))
        consumer.close()
    finally:
        await sender.close()
        broker.close()
