"""`outbox doctor` asks RabbitMQ whether there are workers on the queues in which something waits."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from relay.cli.doctor.findings import Level
from relay.cli.doctor.outside import check_broker_and_queues
from tests.proof.ledger import domain
from tests.waiting import until

if TYPE_CHECKING:
    from relay.cli.doctor.findings import Finding
    from service.settings import Settings
    from tests.proof.rabbitmq.conftest import Ledger, Running
    from tests.servers.processes import Started

pytestmark = pytest.mark.slow


async def _lonely(settings: Settings) -> list[Finding]:
    found = await check_broker_and_queues(settings)
    assert found[0].level == Level.OK, found
    assert found[0].seen.startswith("RabbitMQ")
    return [each for each in found if "no worker takes" in each.seen]


async def test_a_queue_without_worker(ledger: Ledger, settings: Settings, relaying: Running) -> None:
    settings.outbox.redispatch_after = 600
    await ledger.publish(domain.Happened(subject_id=uuid4()))
    async with relaying():
        await until(lambda: _handed_over(ledger))
    [finding] = await _lonely(settings)
    assert (finding.level, finding.seen) == (Level.PROBLEM, "no worker takes what is in ledger")
    assert finding.cure.endswith("-Q ledger")


async def test_a_queue_with_a_worker(ledger: Ledger, settings: Settings, relaying: Running, worker: Started) -> None:
    settings.outbox.redispatch_after = 600
    await ledger.publish(domain.Happened(subject_id=uuid4(), how="hang"))
    async with relaying():
        await until(lambda: _handed_over(ledger))
    assert not await _lonely(settings)


async def _handed_over(ledger: Ledger) -> bool:
    return not await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")
