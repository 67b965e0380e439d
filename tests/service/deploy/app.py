"""A domain with a table of its own, and its worker: `dramatiq tests.service.deploy.app:setup_broker`."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from service.outbox import Delivery, Event, Fail, consumer
from tests.servers.broker import setup_broker

__all__ = ["SCHEMA", "Happened", "setup_broker"]

SCHEMA = "CREATE TABLE effect (message_id uuid NOT NULL)"


class Happened(Event, type="deploy.happened"):
    """Its consumer ends as `how` says: `well`, in a failure, or in one that no retry can mend."""

    subject_id: UUID
    how: str


@consumer(Happened, queue="deploy", name="deploy.react", max_retries=2)
async def react(event: Happened, delivery: Delivery) -> None:
    """One effect, or the failure that the event names."""
    match event.how:
        case "fail":
            raise RuntimeError(f"cannot handle {event.subject_id}")
        case "die":
            raise Fail("not worth another try")
    async with delivery.begin() as session:
        await session.execute(text("INSERT INTO effect VALUES (:id)"), {"id": delivery.idempotency_key})
