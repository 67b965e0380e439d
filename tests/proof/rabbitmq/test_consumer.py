"""The worker's broker on RabbitMQ, taken by itself: what it acknowledges and what it leaves open."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import dramatiq
import pika
import pytest
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from pydantic import SecretStr

from service.settings import BrokerSettings
from service.worker.dramatiq_broker import make_broker
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    import aiormq
    from dramatiq.broker import Broker, Consumer, MessageProxy

    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(rabbitmq: Rabbitmq) -> Iterator[Broker]:
    broker = make_broker(BrokerSettings(url=SecretStr(rabbitmq.url)), [])
    broker.declare_queue("ledger")
    yield broker
    broker.close()


def send(broker: Broker) -> str:
    message: dramatiq.Message[None] = dramatiq.Message("ledger", "any.actor", ("x",), {}, {})
    return broker.enqueue(message).message_id


def take(consumer: Consumer) -> MessageProxy:
    message = until_sync(lambda: next(consumer), what="a message")
    assert message is not None
    return message


def waiting(broker: Broker) -> int:
    assert isinstance(broker, RabbitmqBroker)
    counts: tuple[int, int, int] = broker.get_queue_message_counts("ledger")
    return counts[0]


async def test_an_enqueue_waits_for_its_confirmation(broker: Broker) -> None:
    """Else a message to a deleted queue would be lost without a word."""
    send(broker)
    assert isinstance(broker, RabbitmqBroker)
    broker.channel.queue_delete("ledger")
    send(broker)
    assert waiting(broker) == 1


async def test_a_message_of_an_ended_connection_does_not_acknowledge_another(broker: Broker) -> None:
    """Delivery tags begin again with every connection."""
    send(broker)
    first = broker.consume("ledger", timeout=200)
    stale = take(first)
    first.close()
    second = broker.consume("ledger", timeout=200)
    take(second)
    second.ack(stale)
    second.close()
    assert waiting(broker) == 1


async def test_an_acknowledgement_that_is_too_late_does_not_hold_the_thread_up(
    broker: Broker, rabbitmq: Rabbitmq
) -> None:
    send(broker)
    consumer = broker.consume("ledger", timeout=200)
    message = take(consumer)
    consumer.close()
    consumer.ack(message)
    assert waiting(broker) == 1


async def test_an_acknowledgement_is_sent_at_once(broker: Broker, rabbitmq: Rabbitmq) -> None:
    """The consumer that sends it sleeps in the meantime."""
    send(broker)
    consumer = broker.consume("ledger", timeout=60_000)
    message = take(consumer)
    began = time.monotonic()
    sleeping = asyncio.create_task(asyncio.to_thread(next, consumer, None))
    consumer.ack(message)

    def nothing_is_open() -> bool:
        return rabbitmq.control("list_queues", "name", "messages").split().count("0") == 3

    await asyncio.to_thread(until_sync, nothing_is_open)
    assert time.monotonic() - began < 20
    assert not sleeping.done()
    send(broker)
    await sleeping
    consumer.close()


async def test_declaring_leaves_no_connection_behind(broker: Broker) -> None:
    """Nobody would answer RabbitMQ's heartbeats on it."""
    consumer = broker.consume("ledger", timeout=200)
    assert isinstance(broker, RabbitmqBroker)
    assert not broker.connections
    consumer.close()


async def test_dramatiqs_own_consumer_quotes_no_body(broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """It logs one that it cannot decode before it is asked for it, by a logger of this name."""
    assert isinstance(broker, RabbitmqBroker)
    consumer = broker.consume("ledger", timeout=200)
    broker.channel.basic_publish("", "ledger", b'{"hunter2')
    until_sync(lambda: next(consumer) or caplog.records)
    consumer.close()
    assert [each.name for each in caplog.records] == ["dramatiq.brokers.rabbitmq._RabbitmqConsumer"]
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("quorum", [False, True], ids=["classic", "quorum"])
async def test_queues_beside_of_other_making_do_not_keep_a_worker_from_its_queue(
    rabbitmq: Rabbitmq, amqp: aiormq.Channel, quorum: bool
) -> None:
    """They are from before an upgrade, or on a node that is down; those of other making are used as they are."""
    for name in ("ledger.DQ", "ledger.XQ"):
        await amqp.queue_declare(name, durable=True, arguments={"x-max-length": 5})
    broker = make_broker(BrokerSettings(url=SecretStr(rabbitmq.url), quorum_queues=quorum), [])
    broker.declare_queue("ledger")
    send(broker)
    message: dramatiq.Message[None] = dramatiq.Message("ledger", "any.actor", ("x",), {}, {})
    broker.enqueue(message, delay=1)
    for name in ("ledger", "ledger.DQ"):
        consumer = broker.consume(name, timeout=200)
        take(consumer)
        consumer.close()
    broker.close()


async def test_a_delay_queue_is_declared_by_its_consumer_once_it_can_be(broker: Broker, amqp: aiormq.Channel) -> None:
    broker.consume("ledger", timeout=200).close()
    await amqp.queue_delete("ledger.DQ")
    broker.consume("ledger.DQ", timeout=200).close()
    assert await amqp.queue_declare("ledger.DQ", passive=True)


async def test_headers_that_cannot_be_decoded_end_no_connection(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would get past that message again."""
    assert isinstance(broker, RabbitmqBroker)
    sent = send(broker)
    with monkeypatch.context() as patch:
        patch.setattr("pika.data.calendar.timegm", lambda _: 2**60)
        headers = {"when": datetime.now(UTC), "nested": {"when": datetime.now(UTC)}}
        message: dramatiq.Message[None] = dramatiq.Message("ledger", "any.actor", (), {}, {})
        broker.channel.basic_publish("", "ledger", message.encode(), pika.BasicProperties(headers=headers))
    consumer = broker.consume("ledger", prefetch=2, timeout=200)
    assert [take(consumer).message_id for _ in range(2)] == [sent, message.message_id]
    consumer.close()
