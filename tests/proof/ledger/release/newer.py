"""The release that replaces it."""

from __future__ import annotations

from uuid import UUID

from service.outbox import Delivery, Event, consumer
from tests.proof.ledger.release.effect import store

__all__ = ["EVENTS"]


class Grown(Event, type="release.grown"):
    """It has gained a field; rows of the older release lack it."""

    subject_id: UUID
    added: int = 7


class Raised(Event, type="release.raised", version=2):
    """A field means something else now; rows of version 1 are still read."""

    subject_id: UUID
    weight: int = 1
    """In grams, if there is a unit."""
    unit: str = "kg"


class Moved(Event, type="release.moved"):
    subject_id: UUID


class Shared(Event, type="release.shared"):
    """One consumer of the older release is gone, another is new."""

    subject_id: UUID


@consumer(Grown, queue="ledger", name="release.read_grown")
async def read_grown(event: Grown, delivery: Delivery) -> None:
    await store(delivery, f"newer: {event.added}")


@consumer(Raised, queue="ledger", name="release.read_raised")
async def read_raised(event: Raised, delivery: Delivery) -> None:
    await store(delivery, f"newer: {event.weight * (1 if event.unit == 'g' else 1000)} g")


@consumer(Moved, queue="ledger", name="release.after", formerly=["release.before"])
async def after(event: Moved, delivery: Delivery) -> None:
    await store(delivery, "newer")


@consumer(Shared, queue="ledger", name="release.stays")
async def stays(event: Shared, delivery: Delivery) -> None:
    await store(delivery, "newer")


@consumer(Shared, queue="ledger", name="release.comes")
async def comes(event: Shared, delivery: Delivery) -> None:
    await store(delivery, "newer")


EVENTS = (Grown, Raised, Moved, Shared)
