"""A relay's metrics on RabbitMQ: messages by queue, without creating one, and a queue that refuses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.proof.ledger import domain
from tests.servers.scraping import shows, watched

if TYPE_CHECKING:
    import aiormq

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow


async def test_messages_are_counted_and_a_queue_with_other_arguments_refuses(
    ledger: Ledger, settings: Settings, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    await amqp.queue_declare("ledger", durable=True, arguments={"x-max-length": 5})
    await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('other', 'me')")
    async with watched(settings):
        await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        page = await shows(settings, lambda page: page("outbox_relay_refused_total", queue="ledger"))
        page = await shows(settings, lambda page: page("outbox_queue_paused", queue="other"))
        assert page("outbox_up", system="broker") == 1
        assert page("outbox_broker_queue_messages", queue="other") is None
        assert await asyncio.to_thread(rabbitmq.control, "list_queues", "name") == "ledger\n"
        await ledger.connection.execute("DELETE FROM paused_queue")
        page = await shows(settings, lambda page: page("outbox_broker_queue_messages", queue="other"))
    assert page("outbox_broker_queue_messages", queue="other") == 1
    assert page("outbox_relay_handed_over_total", queue="other") == 1
