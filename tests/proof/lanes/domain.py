"""Consumers that run in order, for the lanes' own tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sqlalchemy import text

from service.outbox import Delivery, Event, Fail, Retry, consumer, publish

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = """
CREATE TABLE IF NOT EXISTS step (number bigint GENERATED ALWAYS AS IDENTITY, lane text NOT NULL, note text NOT NULL)
"""


class Changed(Event, type="lanes.changed"):
    """What happens in turn to one thing; its consumer does as `how` says."""

    thing: str
    note: str
    how: str = ""


class Removed(Event, type="lanes.removed"):
    """Another type in the same lane."""

    thing: str
    note: str


class Skipped(Event, type="lanes.skipped"):
    """As `Changed`, in a lane that goes on without what is given up."""

    thing: str
    note: str
    how: str = ""


class Pinged(Event, type="lanes.pinged"):
    """Its consumer publishes to another lane in the transaction that completes it, `left` times."""

    thing: str
    note: str
    left: int


class Seen(Event, type="lanes.seen"):
    """Has a consumer in order and one that runs whenever it may."""

    thing: str
    note: str


async def step(delivery: Delivery, lane: str, note: str) -> None:
    """The effect: one row, in the order of commits."""
    async with delivery.begin() as session:
        await session.execute(text("INSERT INTO step (lane, note) VALUES (:lane, :note)"), {"lane": lane, "note": note})


@consumer(Changed, queue="lanes", name="lanes.change", max_retries=1, order_by="thing", lane="thing")
async def change(event: Changed, delivery: Delivery) -> None:
    await react(event, delivery)


@consumer(Removed, queue="lanes", name="lanes.remove", order_by="thing", lane="thing")
async def remove(event: Removed, delivery: Delivery) -> None:
    await step(delivery, event.thing, event.note)


@consumer(Skipped, queue="lanes", name="lanes.skip", max_retries=1, order_by="thing", skip_dead=True)
async def skip(event: Skipped, delivery: Delivery) -> None:
    await react(event, delivery)


async def react(event: Changed | Skipped, delivery: Delivery) -> None:
    """One step, or what the event asks for instead."""
    match event.how:
        case "die":
            raise Fail("poison")
        case "fail once" if delivery.attempt == 1:
            raise Retry("later", delay=0)
        case "outside":
            return
        case "slow":
            await asyncio.sleep(0.01)
    await step(delivery, event.thing, event.note)


@consumer(Pinged, queue="lanes", name="lanes.ping", order_by="thing")
async def ping(event: Pinged, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        if event.left:
            other = "ping" if event.thing == "pong" else "pong"
            publish(session, Pinged(thing=other, note=event.note, left=event.left - 1))
        await session.execute(text("INSERT INTO step (lane, note) VALUES ('ping', :note)"), {"note": event.note})


@consumer(Seen, queue="lanes", name="lanes.see", order_by="thing")
async def see(event: Seen, delivery: Delivery) -> None:
    await step(delivery, event.thing, event.note)


@consumer(Seen, queue="lanes", name="lanes.glance")
async def glance(_event: Seen, _delivery: Delivery) -> None:
    """Nothing to do."""


def changes(thing: str, notes: Sequence[str], **fields: str) -> list[Changed]:
    return [Changed(thing=thing, note=note, **fields) for note in notes]
