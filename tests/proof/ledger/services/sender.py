"""The service that forwards: its worker, whose consumer calls the other one over HTTP."""

from __future__ import annotations

import os
from uuid import UUID

import dramatiq
import httpx

from service.outbox import Delivery, Event, consumer
from service.settings import load_settings
from service.telemetry.logs import configure_logging
from service.worker import build
from tests.proof.ledger.services import crash

__all__ = ["Ordered", "setup_broker"]


class Ordered(Event, type="sender.ordered"):
    subject_id: UUID


@consumer(Ordered, queue="ledger", name="sender.forward", max_retries=200, time_limit=60_000)
async def forward(event: Ordered, delivery: Delivery) -> None:
    """Hand the event over under this delivery's key; it is completed when the other side has answered."""
    async with httpx.AsyncClient(base_url=os.environ["RECEIVER"], timeout=60) as client:
        body = {"subject_id": str(event.subject_id)}
        answer = await client.post("/orders-elsewhere", json=body, headers={"Order-Key": delivery.idempotency_key})
    answer.raise_for_status()
    await crash.here("sender-before-completion")


def setup_broker() -> None:
    """A broker with the sender's consumer only."""
    settings = load_settings()
    configure_logging(settings.log_format, settings.log_level)
    dramatiq.set_broker(build(settings))
