"""A small domain of the test kit's own tests."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import UUID

from sqlalchemy import text

from service.outbox import Deliveries, Delivery, Event, Fail, Retry, consumer, new_id, publish

__all__ = ["DONE", "LET_GO", "Announced", "Arrived", "Echoed", "Failing", "Forgotten", "Hanging", "Loaded", "Weighed"]

DONE: list[str] = []
"""What the consumers below have done."""

LET_GO = threading.Event()
"""Ends the consumer that hangs."""


class Arrived(Event, type="testkit.arrived"):
    parcel_id: UUID
    pieces: int = 1


class Announced(Event, type="testkit.announced"):
    parcel_id: UUID


class Failing(Event, type="testkit.failing"):
    parcel_id: UUID
    how: str = ""


class Weighed(Event, type="testkit.weighed"):
    parcel_id: UUID
    grams: int


class Hanging(Event, type="testkit.hanging"):
    parcel_id: UUID


class Echoed(Event, type="testkit.echoed"):
    parcel_id: UUID


class Loaded(Event, type="testkit.loaded"):
    parcel_id: UUID
    fits: bool = True


class Forgotten(Event, type="testkit.forgotten", unconsumed=True):
    parcel_id: UUID


@consumer(Arrived, queue="testkit", name="testkit.store")
async def store(event: Arrived, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        await session.execute(text("SELECT 1"))
        publish(session, Announced(parcel_id=event.parcel_id))
        publish(session, Announced(parcel_id=new_id()), delay=timedelta(hours=1))
    DONE.append("store")


@consumer(Arrived, queue="testkit", name="testkit.count")
async def count(event: Arrived, delivery: Delivery) -> None:
    DONE.append(f"count {delivery.attempt}")


@consumer(Announced, queue="testkit", name="testkit.announce")
async def announce(event: Announced, delivery: Delivery) -> None:
    DONE.append(f"announce {event.parcel_id}")


@consumer(Failing, queue="testkit", name="testkit.fail", max_retries=1, min_backoff=60_000)
async def fail(event: Failing, delivery: Delivery) -> None:
    DONE.append(f"fail {delivery.attempt}")
    match event.how:
        case "recovers" if delivery.attempt == 2:
            return
        case "for good":
            raise Fail("it is broken")
        case "retry":
            raise Retry("not yet", delay=1)
    raise RuntimeError("no luck today")


@consumer(Weighed, queue="testkit-cpu", name="testkit.weigh", max_retries=0)
def weigh(event: Weighed, delivery: Delivery) -> None:
    if event.grams == 0:
        raise RuntimeError("nothing to weigh")
    DONE.append(f"weigh {event.grams}")


@consumer(Hanging, queue="testkit-cpu", name="testkit.hang", time_limit=100)
def hang(event: Hanging, delivery: Delivery) -> None:
    LET_GO.wait()  # in C code, which no exception reaches


@consumer(Echoed, queue="testkit", name="testkit.echo")
async def echo(event: Echoed, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        publish(session, Echoed(parcel_id=event.parcel_id))


@consumer(Loaded, queue="testkit", name="testkit.load", batch=3)
async def load(events: list[Loaded], deliveries: Deliveries) -> None:
    DONE.append(f"load {len(events)}")
    if not all(event.fits for event in events):
        raise RuntimeError("it does not fit")
    async with deliveries.begin() as session:
        await session.execute(text("SELECT 1"))
