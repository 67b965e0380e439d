"""The domain that is attacked: small, and of the suite's own, so that it outlives the example.

    POST /things ─► thing, event made ─┬─► chaos.book      booking and shard, in this database; publishes booked
                                       └─► chaos.compute   tells the sink, from a `def` consumer
                    event booked ────────► chaos.confirm   tells the sink, from an `async def` consumer

Where it is asked for, each thing also takes the next number of one of a few keys, whose row decides in which order the
requests commit; chaos.take_turn must see them in that order, one at a time.

The ledger's own domain (`tests/proof/ledger/domain.py`) misbehaves in one way in each test; here all happens at once,
and the checker must be able to tell from the tables and the sink what became of each.

No table has a constraint that would hide a repeated effect.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import text

from service.outbox import Deliveries, Delivery, Event, Fail, consumer, publish
from tests.proof.chaos.strikes import dice, record

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = [
    "BLOCKED",
    "OUTSIDE",
    "PLAIN_POISON",
    "POISON",
    "SCHEMA",
    "PlainlyPoisoned",
    "Poisoned",
    "ThingBooked",
    "ThingMade",
    "ThingNumbered",
]

SCHEMA = """
CREATE TABLE thing (subject_id uuid NOT NULL, how text NOT NULL);
CREATE TABLE booking (subject_id uuid NOT NULL, message_id uuid NOT NULL, attempt int NOT NULL, pid int NOT NULL);
CREATE TABLE shard (id int PRIMARY KEY, total bigint NOT NULL);
INSERT INTO shard SELECT id, 0 FROM generate_series(0, 7) AS id;
CREATE TABLE key (key int PRIMARY KEY, numbers int NOT NULL);
INSERT INTO key SELECT id, 0 FROM generate_series(0, 3) AS id;
CREATE TABLE turn (place bigint GENERATED ALWAYS AS IDENTITY, key int NOT NULL, number int NOT NULL, saw int NOT NULL);
"""

OUTSIDE = ("chaos.compute", "chaos.confirm")
"""Consumers whose effect is at the sink."""

POISON = ("fail", "kill", "kill_backend", "hang", "swallow", "block", "block_for_ever")
"""What a poisonous event may do each time it is tried."""

PLAIN_POISON = ("plain_fail", "plain_kill", "plain_hang")
"""The same in a `def` consumer."""

BLOCKED = 4.0
"""Seconds for which `block` blocks."""

_PAUSE = 0.04
_BATCH = int(os.environ.get("CHAOS_BATCH", "0"))
"""How many are booked at once, if they are."""

_SINK_TIMEOUT = float(os.environ.get("CHAOS_SINK_TIMEOUT", "12"))


class ThingMade(Event, type="chaos.made"):
    subject_id: UUID
    how: str = ""


class ThingBooked(Event, type="chaos.booked"):
    subject_id: UUID
    how: str = ""


class ThingNumbered(Event, type="chaos.numbered"):
    """One of those with this key, whose publishers wait for each other until they have committed."""

    key: int
    number: int


class Poisoned(Event, type="chaos.poisoned"):
    subject_id: UUID
    how: str


class PlainlyPoisoned(Event, type="chaos.plainly_poisoned"):
    subject_id: UUID
    how: str


if not _BATCH:

    @consumer(ThingMade, queue="stock", name="chaos.book")
    async def book(event: ThingMade, delivery: Delivery) -> None:
        """One booking, one more in a shard, one further event; all or nothing."""
        await misbehave(event.how, delivery.attempt)
        async with delivery.begin() as session:
            await write_booking(session, event.subject_id, delivery)
            await asyncio.sleep(1.0 if event.how == "slow" else dice().uniform(0, _PAUSE))
            await count_booking(session, event.subject_id)
            publish(session, ThingBooked(subject_id=event.subject_id, how=event.how))

else:

    @consumer(ThingMade, queue="stock", name="chaos.book", batch=_BATCH)
    async def book_all(events: list[ThingMade], deliveries: Deliveries) -> None:
        """The same for many; all of all of them or nothing."""
        for event, delivery in zip(events, deliveries, strict=True):
            await misbehave(event.how, delivery.attempt)
        async with deliveries.begin() as session:
            for event, delivery in zip(events, deliveries, strict=True):
                await write_booking(session, event.subject_id, delivery)
                await asyncio.sleep(dice().uniform(0, _PAUSE / _BATCH))
            for event in sorted(events, key=lambda event: event.subject_id.int % 8):  # or two batches might deadlock
                await count_booking(session, event.subject_id)
                publish(session, ThingBooked(subject_id=event.subject_id, how=event.how))


async def misbehave(how: str, attempt: int) -> None:
    """What an ordinary event may be asked to do in its first attempts only."""
    match how, attempt:
        case "linger", 1:
            await asyncio.sleep(float(os.environ["CHAOS_LINGER"]))
        case "linger", 2:
            _die()
        case "held", _:
            while os.path.exists(os.environ["CHAOS_HOLD"]):  # noqa: ASYNC110, ASYNC240, PTH110
                await asyncio.sleep(0.05)


def _die() -> None:
    record("poison.kill", "kill")
    os.kill(os.getpid(), signal.SIGKILL)


async def write_booking(session: AsyncSession, subject: UUID, delivery: Delivery) -> None:
    """The first half of the effect."""
    await session.execute(
        text("INSERT INTO booking VALUES (:subject, :message, :attempt, :pid)"),
        {"subject": subject, "message": delivery.idempotency_key, "attempt": delivery.attempt, "pid": os.getpid()},
    )


async def count_booking(session: AsyncSession, subject: UUID) -> None:
    """The second half: it shows a lost or repeated update even where rows look right."""
    await session.execute(text("UPDATE shard SET total = total + 1 WHERE id = :id"), {"id": subject.int % 8})


@consumer(ThingNumbered, queue="stock", name="chaos.take_turn", order_by="key")
async def take_turn(event: ThingNumbered, delivery: Delivery) -> None:
    """Note the number, and the greatest that was there before."""
    if os.path.exists(os.environ["CHAOS_HOLD"]) and dice().random() < 0.1:  # noqa: ASYNC240, PTH110
        raise Fail("not now")
    async with delivery.begin() as session:
        await write_turn(session, event)
        await asyncio.sleep(dice().uniform(0, _PAUSE))


async def write_turn(session: AsyncSession, event: ThingNumbered) -> None:
    """What another run of the same key at the same time has not committed is not seen."""
    await session.execute(
        text(
            """INSERT INTO turn (key, number, saw)
               SELECT :key, :number, coalesce(max(number), 0) FROM turn WHERE key = :key"""
        ),
        {"key": event.key, "number": event.number},
    )


@consumer(ThingBooked, queue="mail", name="chaos.confirm")
async def confirm(event: ThingBooked, delivery: Delivery) -> None:
    """An effect outside the database, and a while until the delivery is completed."""
    began = time.monotonic()
    async with delivery.read() as session:
        await session.execute(text("SELECT 1"))
    await asyncio.sleep(_until_told())
    await tell_sink(_copy(event.subject_id, delivery, began))
    await asyncio.sleep(dice().uniform(0, _PAUSE))


if not os.environ.get("CHAOS_OLD"):  # a worker that was deployed before this consumer was written

    @consumer(ThingMade, queue="mail", name="chaos.compute")
    def compute(event: ThingMade, delivery: Delivery) -> None:
        """The same from a thread."""
        began = time.monotonic()
        time.sleep(_until_told())
        tell_sink_blocking(_copy(event.subject_id, delivery, began))
        time.sleep(dice().uniform(0, _PAUSE))


@consumer(Poisoned, queue="poison", name="chaos.suffer", max_retries=2, time_limit=1_500)
async def suffer(event: Poisoned, delivery: Delivery) -> None:
    """Never succeeds."""
    match event.how:
        case "fail":
            raise RuntimeError("as always")
        case "kill":
            _die()
        case "hang":
            await asyncio.sleep(3600)
        case "block":
            record("poison.block", "block")
            time.sleep(BLOCKED)  # noqa: ASYNC251  the misbehaviour under test
            raise RuntimeError("blocked the loop for longer than a lease")
        case "block_for_ever":
            record("poison.block", "block")
            while True:
                time.sleep(1)  # noqa: ASYNC251
        case "swallow":
            await _swallow()
        case "kill_backend":
            async with delivery.begin() as session:
                await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


async def _swallow() -> None:
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


@consumer(PlainlyPoisoned, queue="poison", name="chaos.suffer_plainly", max_retries=2, time_limit=1_500)
def suffer_plainly(event: PlainlyPoisoned, delivery: Delivery) -> None:
    """Never succeeds, in a thread."""
    match event.how:
        case "plain_fail":
            raise RuntimeError("as always")
        case "plain_kill":
            _die()
        case "plain_hang":
            while True:
                time.sleep(0.05)


def _until_told() -> float:
    """Seconds; asked for in each run, since the process may be a fork of one with other variables."""
    return dice().uniform(0, float(os.environ.get("CHAOS_PAUSE", _PAUSE)))


def _copy(subject: UUID, delivery: Delivery, began: float) -> bytes:
    document: dict[str, Any] = {
        "key": delivery.idempotency_key,
        "subject": str(subject),
        "consumer": delivery.consumer,
        "attempt": delivery.attempt,
        "pid": os.getpid(),
        "began": began,
    }
    return json.dumps(document).encode() + b"\n"


def _sink() -> tuple[str, int]:
    host, _, port = os.environ["CHAOS_SINK"].partition(":")
    return host, int(port)


async def tell_sink(copy: bytes) -> None:
    """Send, and wait for the acknowledgement."""
    async with asyncio.timeout(_SINK_TIMEOUT):
        reader, writer = await asyncio.open_connection(*_sink())
        try:
            writer.write(copy)
            if await reader.readline() != b"ok\n":
                raise ConnectionError("the sink did not acknowledge")
        finally:
            writer.close()


def tell_sink_blocking(copy: bytes) -> None:
    """The same for a thread."""
    with socket.create_connection(_sink(), timeout=_SINK_TIMEOUT) as connection:
        connection.sendall(copy)
        if connection.recv(3) != b"ok\n":
            raise ConnectionError("the sink did not acknowledge")
