"""`outbox status` tells the queues of RabbitMQ apart, and creates none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from relay.cli.status import Status, gather
from tests.proof.ledger import domain
from tests.proof.rabbitmq.queues import hanging
from tests.waiting import until

if TYPE_CHECKING:
    import aiormq

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger
    from tests.proof.rabbitmq.conftest import Running
    from tests.proof.rabbitmq.server import Rabbitmq

pytestmark = pytest.mark.slow


def states(status: Status) -> dict[str, str]:
    return {name: each.state for name, each in status.queues.items()}


async def test_a_missing_queue_is_named_and_not_created(ledger: Ledger, settings: Settings, rabbitmq: Rabbitmq) -> None:
    await ledger.publish()
    for _ in range(2):
        assert states(await gather(settings)) == {"ledger": "missing"}
    assert await asyncio.to_thread(rabbitmq.control, "list_queues", "name") == ""


async def test_a_queue_with_other_arguments_is_refused(
    ledger: Ledger, settings: Settings, amqp: aiormq.Channel
) -> None:
    await ledger.publish()
    await amqp.queue_declare("ledger", durable=True, arguments={"x-max-length": 5})
    status = await gather(settings)
    assert states(status) == {"ledger": "refused"}
    assert "PRECONDITION_FAILED" in str(status.queues["ledger"].problem)


async def test_a_queue_that_hangs_is_named_and_the_others_are_counted(
    ledger: Ledger, settings: Settings, relaying: Running, rabbitmq: Rabbitmq, amqp: aiormq.Channel
) -> None:
    settings.outbox.high_water_mark = 1
    await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    async with relaying():
        await until(lambda: in_the_broker(ledger))
    async with hanging(rabbitmq):
        status = await gather(settings)
    assert states(status) == {"ledger": "refused", "other": "full"}
    assert status.queues["other"].waiting == 1
    assert "did not answer" in str(status.queues["ledger"].problem)
    assert status.broker_problem is None


async def in_the_broker(ledger: Ledger) -> bool:
    return not await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state <> 'dispatched'")
