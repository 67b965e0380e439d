"""A domain whose consumer fails for good until it is told otherwise, and its worker."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import text

from service.outbox import Delivery, Event, Fail, consumer
from tests.servers.broker import setup_broker

__all__ = ["SCHEMA", "Tried", "setup_broker"]

SCHEMA = "CREATE TABLE repaired (subject text PRIMARY KEY); CREATE TABLE effect (subject text NOT NULL)"


class Tried(Event, type="console.tried"):
    """What it is about succeeds once its subject is among those that were repaired."""

    event_name: str
    subject: UUID


@consumer(Tried, queue="tries", name="console.try_it", max_retries=1)
async def try_it(event: Tried, delivery: Delivery) -> None:
    """One effect, or a dead letter."""
    async with delivery.read() as session:
        known = await session.scalar(
            text("SELECT count(*) FROM repaired WHERE subject = :it"), {"it": event.event_name}
        )
    if not known:
        raise Fail(f"{event.event_name} is broken")
    async with delivery.begin() as session:
        await session.execute(text("INSERT INTO effect VALUES (:it)"), {"it": event.event_name})
