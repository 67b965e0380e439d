"""What the sender hands to RabbitMQ, and whom it blames when that fails."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
import pytest
from aiormq import DeliveryError
from pydantic import SecretStr

from relay.brokers import make_sender
from relay.brokers.rabbitmq_batch import send_batch
from relay.brokers.rabbitmq_channel import OneChannel
from relay.brokers.rabbitmq_sender import RabbitmqSender
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError
from service.ledger.message import DueDelivery
from service.settings import BrokerSettings
from tests.proof.rabbitmq.queues import count, hanging
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import aiormq
    from aiormq.abc import DeliveredMessage

    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow


def batch(size: int = 3) -> list[DueDelivery]:
    return [DueDelivery(str(uuid4()), "ledger.react", None) for _ in range(size)]


@pytest.fixture
async def sender(rabbitmq: Rabbitmq) -> AsyncIterator[RabbitmqSender]:
    sender = make_sender(BrokerSettings(url=SecretStr(rabbitmq.url), publish_timeout=4))
    assert isinstance(sender, RabbitmqSender)
    yield sender
    await sender.close()


async def get(amqp: aiormq.Channel, queue: str = "ledger") -> DeliveredMessage:
    message = await amqp.basic_get(queue, no_ack=True)
    assert message.message_count is not None, "the queue is empty"
    return message


async def test_a_batch_is_queued_durably_in_its_order(sender: RabbitmqSender, amqp: aiormq.Channel) -> None:
    rows = batch(500)
    await sender.hand_over("ledger", rows, "t")
    assert await sender.depth("ledger") == 500
    found = [(await get(amqp)).header.properties for _ in rows]
    assert [properties.message_id for properties in found] == [row.delivery_id for row in rows]
    assert {properties.delivery_mode for properties in found} == {2}


async def test_a_body_larger_than_a_frame_arrives_whole(sender: RabbitmqSender, amqp: aiormq.Channel) -> None:
    row = DueDelivery(str(uuid4()), "x" * 300_000, None)
    await sender.hand_over("ledger", [row, *batch()], "t")
    assert json.loads((await get(amqp)).body)["actor_name"] == row.consumer
    assert await count(amqp) == 3


async def test_it_tells_the_depth_with_every_batch(sender: RabbitmqSender) -> None:
    await sender.hand_over("ledger", batch(20), "t")
    assert 20 <= await sender.hand_over("ledger", batch(5), "t") <= 25


async def test_a_deleted_queue_is_refused_once_and_then_declared_again(
    sender: RabbitmqSender, amqp: aiormq.Channel
) -> None:
    await sender.hand_over("ledger", batch(), "t")
    await amqp.queue_delete("ledger")
    with pytest.raises(QueueRefusedError):
        await sender.hand_over("ledger", batch(), "t")
    await sender.hand_over("ledger", batch(), "t")
    assert await count(amqp) == 3


async def test_what_no_queue_takes_is_returned(rabbitmq: Rabbitmq) -> None:
    """A queue that is deleted and declared again around the batch would answer with its depth as if it had taken it."""
    line = OneChannel(BrokerSettings(url=SecretStr(rabbitmq.url)))
    channel = await line.open()
    with pytest.raises(DeliveryError):
        await send_batch(channel, "missing", [(str(uuid4()), b"{}")])
    await line.close()


async def test_a_queue_with_other_arguments_is_refused_and_another_is_not(
    sender: RabbitmqSender, amqp: aiormq.Channel
) -> None:
    await amqp.queue_declare("ledger", durable=True, arguments={"x-max-length": 5})
    for _ in range(2):
        with pytest.raises(QueueRefusedError, match="PRECONDITION_FAILED"):
            await sender.hand_over("ledger", batch(), "t")
        await sender.hand_over("other", batch(), "t")
    assert await count(amqp, "other") == 6


async def test_a_queue_that_rejects_is_refused(
    sender: RabbitmqSender, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    policy = '{"max-length": 2, "overflow": "reject-publish"}'
    await asyncio.to_thread(rabbitmq.control, "set_policy", "full", "^ledger$", policy)
    try:
        with pytest.raises(QueueRefusedError, match="Nack"):
            await sender.hand_over("ledger", batch(10), "t")
        await sender.hand_over("other", batch(), "t")
    finally:
        await asyncio.to_thread(rabbitmq.control, "clear_policy", "full")


async def test_a_queue_that_hangs_is_refused_and_another_is_not(
    sender: RabbitmqSender, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    """As a quorum queue does that has lost its majority."""
    await sender.hand_over("ledger", batch(), "t")
    async with hanging(rabbitmq):
        began = time.monotonic()
        with pytest.raises(QueueRefusedError, match="did not answer"):
            await sender.hand_over("ledger", batch(500), "t")
        assert time.monotonic() - began < 4.5
        await sender.hand_over("other", batch(500), "t")
    assert await count(amqp, "other") == 500


@pytest.mark.parametrize("queue", ["", "x" * 300, "amq.reserved"])
async def test_an_impossible_name_is_the_queues_fault(sender: RabbitmqSender, queue: str) -> None:
    with pytest.raises(QueueRefusedError):
        await sender.hand_over(queue, batch(), "t")


async def test_queues_that_ask_at_once_whether_the_broker_is_well_share_a_connection(
    sender: RabbitmqSender, rabbitmq: Rabbitmq
) -> None:
    await asyncio.gather(*[sender.ping() for _ in range(3)])
    connections = await asyncio.to_thread(rabbitmq.control, "list_connections", "pid")
    assert len(connections.splitlines()) == 1


async def test_a_memory_alarm_is_the_brokers_fault_and_is_noticed_at_once(
    sender: RabbitmqSender, rabbitmq: Rabbitmq
) -> None:
    await sender.hand_over("ledger", batch(), "t")
    await asyncio.to_thread(rabbitmq.fill_memory)
    try:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailableError, match="out of memory"):
            await sender.hand_over("ledger", batch(), "t")
        with pytest.raises(BrokerUnavailableError, match="out of memory"):
            await sender.ping()
        assert time.monotonic() - began < 1
    finally:
        await asyncio.to_thread(rabbitmq.free_memory)
    await sender.ping()
    await sender.hand_over("ledger", batch(), "t")


async def test_a_stopped_broker_is_unavailable_until_it_is_back(
    sender: RabbitmqSender, rabbitmq: Rabbitmq, caplog: pytest.LogCaptureFixture
) -> None:
    await sender.hand_over("ledger", batch(), "t")
    await sender.ping()
    await asyncio.to_thread(rabbitmq.stop)
    for _ in range(2):
        with pytest.raises(BrokerUnavailableError):
            await sender.hand_over("ledger", batch(500), "t")
        with pytest.raises(BrokerUnavailableError):
            await sender.ping()
    await asyncio.to_thread(rabbitmq.start)
    await sender.ping()
    await sender.hand_over("ledger", batch(), "t")
    assert await sender.depth("ledger") == 6
    assert caplog.records == []


async def test_a_broker_that_is_killed_in_mid_batch_is_unavailable(sender: RabbitmqSender, rabbitmq: Rabbitmq) -> None:
    await sender.hand_over("ledger", batch(), "t")
    node = psutil.Process(rabbitmq.pid)
    for process in (node, *node.children(recursive=True)):
        process.suspend()  # so that it cannot have confirmed everything first
    task = asyncio.create_task(sender.hand_over("ledger", batch(5_000), "t"))
    await asyncio.to_thread(rabbitmq.kill)
    with pytest.raises(BrokerUnavailableError):
        await task


async def test_a_broker_that_says_nothing_is_unavailable_in_time() -> None:
    callers: set[asyncio.StreamWriter] = set()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.add(writer)
        with suppress(OSError):
            await reader.read()
        writer.close()
        callers.remove(writer)

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sender = RabbitmqSender(BrokerSettings(url=SecretStr(f"amqp://guest:guest@127.0.0.1:{port}/"), publish_timeout=0.5))
    began = time.monotonic()
    with pytest.raises(BrokerUnavailableError, match="did not answer"):
        await sender.hand_over("ledger", batch(), "t")
    assert time.monotonic() - began < 1
    await until(lambda: not callers, what="both connections to be given up")
    await sender.close()
    server.close()


async def test_a_cancelled_batch_leaves_a_sender_that_works(sender: RabbitmqSender, amqp: aiormq.Channel) -> None:
    await sender.hand_over("ledger", batch(), "t")
    tasks = len(asyncio.all_tasks())
    task = asyncio.create_task(sender.hand_over("ledger", batch(2_000), "t"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await sender.hand_over("ledger", batch(), "t")
    assert await sender.depth("ledger") >= 6
    await until(lambda: len(asyncio.all_tasks()) == tasks, what="what was given up to end")


async def test_a_quorum_queue_is_declared_where_asked_for(rabbitmq: Rabbitmq, amqp: aiormq.Channel) -> None:
    sender = RabbitmqSender(BrokerSettings(url=SecretStr(rabbitmq.url), quorum_queues=True))
    await sender.hand_over("ledger", batch(), "t")
    kinds = await asyncio.to_thread(rabbitmq.control, "list_queues", "name", "type")
    assert ["ledger", "quorum"] in [line.split() for line in kinds.splitlines()]
    await sender.close()
