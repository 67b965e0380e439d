"""A queue that RabbitMQ has lost or that hangs costs the others nothing, and comes back by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from relay.brokers.rabbitmq_sender import RabbitmqSender
from tests.proof.ledger import domain
from tests.proof.ledger.looks import dispatched
from tests.proof.rabbitmq.queues import count, hanging
from tests.servers.relaying import relaying as relaying_with
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    import aiormq
    from pamqp.common import FieldTable

    from service.ledger.message import DueDelivery
    from service.settings import BrokerSettings, Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.conftest import Running
    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow


async def test_a_queue_deleted_at_its_mark_is_declared_anew_and_filled_again(
    ledger: Ledger, settings: Settings, relaying: Running, amqp: aiormq.Channel
) -> None:
    settings.outbox.high_water_mark, settings.outbox.batch_size = 10, 4
    for _ in range(20):
        await ledger.publish()
    async with relaying():
        await until(lambda: is_full(amqp))
        await amqp.queue_delete("ledger")
        _, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: dispatched(ledger, fine))
        await until(lambda: is_full(amqp))
        # That was the rest of the backlog. Once there is room again, what was in the queue follows.
        await amqp.queue_purge("ledger")
        await until(lambda: handed_over_again(ledger))


async def is_full(amqp: aiormq.Channel) -> bool:
    """Whether the queue is at its mark of 10, by RabbitMQ's own count, which comes a batch late."""
    # A passive declaration of a queue that is missing would end the test's channel.
    arguments: FieldTable = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "ledger.XQ"}
    return ((await amqp.queue_declare("ledger", durable=True, arguments=arguments)).message_count or 0) >= 10


async def handed_over_again(ledger: Ledger) -> bool:
    return bool(
        await ledger.connection.fetchval(
            "SELECT count(*) FROM outbox_message WHERE queue = 'ledger' AND dispatches >= 2 AND attempts = 0"
        )
    )


class Watched(RabbitmqSender):
    """Knows how often it was asked to serve the queue `ledger`."""

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(settings)
        self.asked = 0

    async def hand_over(self, queue: str, batch: Sequence[DueDelivery], transaction: str) -> int:
        self.asked += queue == "ledger"
        return await super().hand_over(queue, batch, transaction)


async def test_a_queue_that_hangs_holds_no_other_up(
    ledger: Ledger, settings: Settings, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    sender = Watched(settings.broker)
    async with relaying_with(settings, sender):
        first, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: both_dispatched(ledger, first, fine))
        async with hanging(rabbitmq):
            before = sender.asked
            (stuck,) = await ledger.publish()
            for tries in (2, 3):
                await until(lambda: sender.asked >= before + tries)  # noqa: B023
                _, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
                await until(lambda: dispatched(ledger, fine), timeout=2)  # noqa: B023
            assert await ledger.state(stuck) == "pending"
        await until(lambda: dispatched(ledger, stuck))
    assert await count(amqp) >= 2


async def both_dispatched(ledger: Ledger, *ids: UUID) -> bool:
    return all([await dispatched(ledger, each) for each in ids])


async def test_a_queue_that_hangs_at_its_mark_holds_no_other_up(
    ledger: Ledger, settings: Settings, relaying: Running, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    """It is asked only for its depth, and does not answer that either."""
    settings.outbox.high_water_mark, settings.outbox.batch_size = 10, 10
    settings.broker.publish_timeout = 2
    for _ in range(30):
        await ledger.publish()
    async with relaying():
        await until(lambda: is_full(amqp))
        async with hanging(rabbitmq):
            for _ in range(3):
                _, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
                await until(lambda: dispatched(ledger, fine), timeout=20)  # noqa: B023
        await amqp.queue_purge("ledger")
        await until(lambda: is_full(amqp))
