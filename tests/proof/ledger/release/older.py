"""The release that is being replaced."""

from __future__ import annotations

from uuid import UUID

from service.outbox import Delivery, Event, consumer
from tests.proof.ledger.release.effect import store

__all__ = ["EVENTS"]


class Grown(Event, type="release.grown"):
    subject_id: UUID


class Raised(Event, type="release.raised", version=1):
    subject_id: UUID
    weight: int = 1
    """In kilograms."""


class Moved(Event, type="release.moved"):
    subject_id: UUID


class Shared(Event, type="release.shared"):
    """What it is consumed by changes with the release."""

    subject_id: UUID


@consumer(Grown, queue="ledger", name="release.read_grown")
async def read_grown(event: Grown, delivery: Delivery) -> None:
    await store(delivery, "older")


@consumer(Raised, queue="ledger", name="release.read_raised")
async def read_raised(event: Raised, delivery: Delivery) -> None:
    await store(delivery, f"older: {event.weight * 1000} g")


@consumer(Moved, queue="ledger", name="release.before")
async def before(event: Moved, delivery: Delivery) -> None:
    await store(delivery, "older")


@consumer(Shared, queue="ledger", name="release.stays")
async def stays(event: Shared, delivery: Delivery) -> None:
    await store(delivery, "older")


@consumer(Shared, queue="ledger", name="release.goes")
async def goes(event: Shared, delivery: Delivery) -> None:
    await store(delivery, "older")


EVENTS = (Grown, Raised, Moved, Shared)
