"""Batch consumers for the ledger's tests, and their worker: `dramatiq tests.proof.ledger.batched:setup_broker`."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text

from service.outbox import Deliveries, Event, Fail, Retry, consumer
from tests.proof.ledger.domain import Gate, by_driver
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["setup_broker"]

SIZE = 8


class Counted(Event, type="ledger.counted", version=2):
    """A batch with one of these does as its `how` says."""

    subject_id: UUID
    how: str = ""


BATCHES: list[int] = []
"""The sizes of those that began."""

GATES: list[Gate] = []
"""One for each batch in turn; further ones do not wait."""


@consumer(
    Counted, queue="ledger", name="ledger.count", formerly=["ledger.tally"], batch=SIZE, max_retries=0,
    throws=NotImplementedError,
)  # fmt: skip
async def count(events: list[Counted], deliveries: Deliveries) -> None:
    """An effect for each, with the size of its batch; it may not fail once."""
    BATCHES.append(len(events))
    await act(events, deliveries)


class Timed(Event, type="ledger.timed"):
    """As `Counted`, of a consumer that has little time."""

    subject_id: UUID
    how: str = ""


@consumer(Timed, queue="ledger", name="ledger.time", batch=SIZE, max_retries=0, time_limit=1_500)
async def time(events: list[Timed], deliveries: Deliveries) -> None:
    BATCHES.append(len(events))
    await act(events, deliveries)


class Weighed(Event, type="ledger.weighed"):
    """As `Counted`, of a consumer that is more patient."""

    subject_id: UUID
    how: str = ""


@consumer(Weighed, queue="ledger", name="ledger.weigh", batch=SIZE, max_retries=2)
async def weigh(events: list[Weighed], deliveries: Deliveries) -> None:
    await act(events, deliveries)


async def act(events: list[Counted] | list[Timed] | list[Weighed], deliveries: Deliveries) -> None:
    ways = {event.how for event in events}
    if "outside" in ways:
        await stand(GATES.pop(0) if GATES else None)
        return
    if "slow" in ways:
        await asyncio.sleep(1)
    if "raw" in ways:
        async with deliveries.connection() as connection:
            ids = [UUID(each.idempotency_key) for each in deliveries]
            await connection.execute("INSERT INTO effect SELECT unnest($1::uuid[]), 'raw', ''", ids)
            await stand(GATES.pop(0) if GATES else None)
        return
    before(ways)
    with suppress(ZeroDivisionError):  # the misbehaviour under test
        async with deliveries.begin() as session:
            rows = [
                {"id": each.idempotency_key, "consumer": each.consumer, "note": str(len(events))} for each in deliveries
            ]
            await session.execute(text("INSERT INTO effect VALUES (:id, :consumer, :note)"), rows)
            await stand(GATES.pop(0) if GATES else None)
            await inside(session, ways)


def before(ways: set[str]) -> None:
    """What a consumer may do wrong outside a transaction."""
    if "fail" in ways:
        raise RuntimeError("one of them cannot be counted")
    if "die" in ways:
        raise Fail("one of them is not worth another try")
    if "throw" in ways:
        raise NotImplementedError
    if "retry" in ways:
        raise Retry("later", delay=60_000)


async def stand(gate: Gate | None) -> None:
    """Wait until the test opens the gate."""
    if gate is not None:
        gate.reached.set()
        await gate.opened.wait()


async def inside(session: AsyncSession, ways: set[str]) -> None:
    """What it may do wrong inside."""
    if "swallow" in ways:
        raise ZeroDivisionError
    if "hang" in ways:
        await asyncio.sleep(3600)
    for how in ways & {"driver_commit", "another_transaction"}:
        await by_driver(session, how)
    if "kill_backend" in ways:
        await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
