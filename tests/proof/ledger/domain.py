"""A small domain for the ledger's own tests, which outlives the example domain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast
from uuid import UUID

from sqlalchemy import text
from structlog.contextvars import get_contextvars

from service.database.lent_connection import LentConnection
from service.errors import TransactionError
from service.outbox import Delivery, Event, Fail, Retry, consumer, publish
from service.telemetry.logs import current_headers

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

# No constraint on message_id: an effect that happens twice must show as two rows.
SCHEMA = "CREATE TABLE IF NOT EXISTS effect (message_id uuid NOT NULL, consumer text NOT NULL, note text)"


class Happened(Event, type="ledger.happened"):
    """Every consumer below that takes it does as `how` says, with a session or with asyncpg's connection (`raw`)."""

    subject_id: UUID
    how: str = ""
    raw: bool = False


class FannedOut(Event, type="ledger.fanned_out"):
    subject_id: UUID


class Ignored(Event, type="ledger.ignored", unconsumed=True):
    subject_id: UUID


class Lonely(Event, type="ledger.lonely"):
    """Nobody consumes it."""

    subject_id: UUID


class Computed(Event, type="ledger.computed"):
    subject_id: UUID
    how: str = ""


async def write_effect(where: AsyncSession | LentConnection, delivery: Delivery, note: str = "") -> None:
    """Insert this delivery's effect."""
    if isinstance(where, LentConnection):
        await where.execute("INSERT INTO effect VALUES ($1, $2, $3)", delivery.idempotency_key, delivery.consumer, note)
        return
    await where.execute(
        text("INSERT INTO effect VALUES (:id, :consumer, :note)"),
        {"id": delivery.idempotency_key, "consumer": delivery.consumer, "note": note},
    )


@consumer(Happened, queue="ledger", name="ledger.react", max_retries=2)
async def react(event: Happened, delivery: Delivery) -> None:
    """One effect, or the misbehaviour that the event names."""
    match event.how:
        case "fail":
            raise RuntimeError(f"cannot handle {event.subject_id}")
        case "die":
            raise Fail("not worth another try")
        case "retry":
            raise Retry("later", delay=60_000)
        case "outside":
            return
        case "system_exit":
            raise SystemExit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "block" | "block_for_ever":
            time.sleep(3 if event.how == "block" else 3600)  # noqa: ASYNC251  the misbehaviour under test
        case "slow" | "slower":
            await asyncio.sleep(1 if event.how == "slow" else 3)
        case "hang":
            await asyncio.sleep(3600)
    await take_effect(event, delivery)


async def take_effect(event: Happened, delivery: Delivery) -> None:
    """Write it, and misbehave."""
    if event.raw:
        async with delivery.connection() as connection:
            await write_effect(connection, delivery)
            await misbehave_in_sql(connection, event.how)
        return
    async with delivery.begin() as session:
        await write_effect(session, delivery)
        await misbehave(session, event.how)


async def misbehave(session: AsyncSession, how: str) -> None:
    """What a consumer may do wrong inside `begin()`."""
    match how:
        case "commit":
            await session.commit()
        case "rollback":
            await session.rollback()
        case "sql_commit":
            await session.execute(text("COMMIT"))
        case "sql_rollback":
            await session.execute(text("ROLLBACK"))
        case "transaction_rollback":
            await cast("AsyncSessionTransaction", session.get_transaction()).rollback()
        case "driver_commit" | "driver_rollback" | "another_transaction":
            await by_driver(session, how)
        case "kill_backend":
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        case "hang_inside":
            await asyncio.sleep(3600)


_ENDS = {
    "driver_commit": "COMMIT",
    "driver_rollback": "ROLLBACK",
    "another_transaction": "ROLLBACK; BEGIN",
    "transaction_rollback": "ROLLBACK AND CHAIN",
}


async def by_driver(session: AsyncSession, how: str) -> None:
    """Past SQLAlchemy, and past whoever looks at how a statement begins."""
    raw = await (await session.connection()).get_raw_connection()
    assert raw.driver_connection is not None
    await raw.driver_connection.execute(f"SELECT 1; {_ENDS[how]}")


async def misbehave_in_sql(connection: LentConnection, how: str) -> None:
    """What a consumer may do wrong inside `connection()`."""
    match how:
        case "sql_commit":
            await connection.execute("COMMIT")
        case "sql_rollback":
            await connection.fetch("-- no effect\nROLLBACK")
        case "driver_commit" | "driver_rollback" | "another_transaction" | "transaction_rollback":
            with suppress(TransactionError):
                await connection.execute(f"SELECT 1; {_ENDS[how]}")
        case "kill_backend":
            await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        case "hang_inside":
            await asyncio.sleep(3600)
        case "conflict":
            await connection.execute("CREATE TEMP TABLE person (name text UNIQUE) ON COMMIT DROP")
            await connection.executemany("INSERT INTO person VALUES ($1)", [("ada",), ("ada",)])


@consumer(FannedOut, queue="ledger", name="ledger.first")
async def first(_event: FannedOut, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        await write_effect(session, delivery)


@consumer(FannedOut, queue="other", name="ledger.second")
async def second(_event: FannedOut, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        await write_effect(session, delivery)


@consumer(Computed, queue="cpu", name="ledger.compute", max_retries=1, time_limit=2_000)
def compute(event: Computed, delivery: Delivery) -> None:
    """A `def` consumer; its effect is outside the database."""
    if event.how == "begin":
        delivery.begin()
    if event.how == "fail":
        raise RuntimeError("cannot compute")
    if event.how == "nap":
        time.sleep(1)
    if event.how == "stick":
        silent, _other = socket.socketpair()
        silent.recv(1)
    if event.how == "spin":
        while True:
            calculate()


def calculate() -> None:
    """20 ms of pure Python, in which no other thread of the process runs but by turns.

    Others ask for their turn after 5 ms without one. A caller that let go of the interpreter's lock more often, but
    for a microsecond, would leave them none at all.
    """
    value, until = 1, time.monotonic() + 0.02
    while time.monotonic() < until:
        value = value * 3 % 1_000_003


class Compared(Event, type="ledger.compared"):
    """Its consumer writes what it sees to the file `seen`, and ends as `how` says."""

    seen: str
    how: str


@consumer(Compared, queue="cpu", name="ledger.compare", max_retries=0, time_limit=1_000)
def compare(event: Compared, delivery: Delivery) -> None:
    """What surrounds a `def` consumer."""
    around = {"event headers": current_headers(), "log fields": get_contextvars(), "attempt": delivery.attempt}
    Path(event.seen).write_text(json.dumps(around, sort_keys=True).replace(delivery.idempotency_key, "the delivery"))
    match event.how:
        case "raises":
            raise SystemExit("whatever it is")
        case "does not end":
            while True:
                calculate()


class Crunched(Event, type="ledger.crunched"):
    """Its consumer calculates until the file `until` is there."""

    subject_id: UUID
    until: str


@consumer(Crunched, queue="cpu", name="ledger.crunch", time_limit=100_000)
def crunch(event: Crunched, delivery: Delivery) -> None:
    """Work for the CPU, and a file beside the other one for an effect."""
    until = Path(event.until)
    while not until.exists():
        calculate()
    until.with_name(delivery.idempotency_key).touch()


class Jotted(Event, type="ledger.jotted"):
    subject_id: UUID


@consumer(Jotted, queue="other", name="ledger.jot")
def jot(_event: Jotted, _delivery: Delivery) -> None:
    """A `def` consumer with nothing to do, in a queue apart from the heavy ones."""


class Abandoned(Event, type="ledger.abandoned"):
    """Its consumer gives up as `how` says, and what is told of that does as `then` says."""

    subject_id: UUID
    how: str = "die"
    then: str = ""


async def console(event: Abandoned, delivery: Delivery) -> None:
    """What is done about an event that was given up."""
    if event.then == "fail":
        raise RuntimeError("no consolation")
    async with delivery.begin() as session:
        await write_effect(session, delivery, f"{event.subject_id} {delivery.dead_letter}")


@consumer(Abandoned, queue="ledger", name="ledger.abandon", max_retries=1, formerly=["ledger.leave"], on_dead=console)
async def abandon(event: Abandoned, delivery: Delivery) -> None:
    """It notes which attempts it took for the last."""
    seen.append((delivery.attempt, delivery.last_attempt, delivery.published_at))
    if event.how == "die":
        raise Fail("no hope")
    if event.how == "commit":
        async with delivery.begin() as session:
            await session.commit()
    raise RuntimeError("failed")


seen: list[tuple[int, bool, datetime]] = []
"""What `abandon` knew: the attempt, whether it is the last, and when the event was published."""


class Misread(Event, type="ledger.misread"):
    """Its consumer publishes where nothing is committed."""

    subject_id: UUID


@consumer(Misread, queue="ledger", name="ledger.misread")
async def misread(event: Misread, delivery: Delivery) -> None:
    async with delivery.read() as session:
        publish(session, Happened(subject_id=event.subject_id))


class Gated(Event, type="ledger.gated"):
    """Its consumer waits in the middle of its effect until the test opens the gate."""

    subject_id: UUID
    raw: bool = False


class Gate:
    """Where a run stands still: `reached` once it is there, `opened` to let it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


GATES: dict[str, list[Gate]] = {}
"""By idempotency key, a gate for each run in turn; runs beyond the list do not wait."""


@consumer(Gated, queue="ledger", name="ledger.wait", max_retries=2)
async def wait(event: Gated, delivery: Delivery) -> None:
    gates = GATES.get(delivery.idempotency_key, [])
    gate = gates.pop(0) if gates else None
    async with delivery.connection() if event.raw else delivery.begin() as where:
        await write_effect(where, delivery)
        if gate is not None:
            gate.reached.set()
            await gate.opened.wait()


class GatedOutside(Event, type="ledger.gated_outside"):
    """As `Gated`, with an effect outside the database."""

    subject_id: UUID


@consumer(GatedOutside, queue="ledger", name="ledger.wait_outside")
async def wait_outside(_event: GatedOutside, delivery: Delivery) -> None:
    (gate,) = GATES.pop(delivery.idempotency_key)
    gate.reached.set()
    await gate.opened.wait()


class Stubborn(Event, type="ledger.stubborn"):
    """Its consumer goes on in its transaction when it is cancelled."""

    subject_id: UUID
    raw: bool = False


@consumer(Stubborn, queue="ledger", name="ledger.insist")
async def insist(event: Stubborn, delivery: Delivery) -> None:
    gates = GATES.get(delivery.idempotency_key, [])
    gate = gates.pop(0) if gates else None
    async with delivery.connection() if event.raw else delivery.begin() as where:
        await write_effect(where, delivery)
        if gate is not None:
            gate.reached.set()
            while not gate.opened.is_set():
                with suppress(asyncio.CancelledError):
                    await gate.opened.wait()


class Endless(Event, type="ledger.endless"):
    """Its consumer goes on for ever, whatever is done about it."""

    subject_id: UUID


@consumer(Endless, queue="ledger", name="ledger.go_on", max_retries=0)
async def go_on(_event: Endless, _delivery: Delivery) -> None:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


class Endured(Event, type="ledger.endured"):
    """Its consumers may not fail once, and take `seconds`."""

    subject_id: UUID
    seconds: float = 0
    at_once: bool = False


@consumer(Endured, queue="ledger", name="ledger.endure", max_retries=0)
async def endure(event: Endured, delivery: Delivery) -> None:
    await asyncio.sleep(event.seconds)
    async with delivery.begin() as session:
        await write_effect(session, delivery)


@consumer(Endured, queue="ledger", name="ledger.endure_outside", max_retries=0)
async def endure_outside(event: Endured, delivery: Delivery) -> None:
    await asyncio.sleep(event.seconds)
    print(f"sent {delivery.idempotency_key}", flush=True)


@consumer(Endured, queue="cpu", name="ledger.endure_in_thread", max_retries=0)
def endure_in_thread(event: Endured, delivery: Delivery) -> None:
    end = time.monotonic() + event.seconds
    if event.at_once:
        time.sleep(event.seconds)
    while time.monotonic() < end:
        time.sleep(0.01)
    print(f"sent {delivery.idempotency_key}", flush=True)


class Unsaid(Event, type="ledger.unsaid"):
    """Its consumer ends with what the test put into `RAISED` for its subject, outside any transaction."""

    subject_id: UUID


RAISED: dict[UUID, BaseException] = {}
"""By subject."""


@consumer(Unsaid, queue="ledger", name="ledger.say", max_retries=2, throws=NotImplementedError)
async def say(event: Unsaid, _delivery: Delivery) -> None:
    raise RAISED[event.subject_id]
