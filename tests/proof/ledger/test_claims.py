"""Claims that are made together: each still is what a claim alone would have been, and none waits for another's row."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from service.ledger import delivering
from service.outbox.running.claims import Claims
from service.outbox.running.runner import Runner
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.driver import Connection
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

LEASE = timedelta(seconds=30)


class Lender:
    """Lends connections, and can be told to lend none for a while."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self.lending = asyncio.Event()
        self.lending.set()
        self.asked = False
        self.loans = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Connection]:
        self.asked = True
        await self.lending.wait()
        self.loans += 1
        yield await self._connect()


@pytest.fixture
def lender(connect: Connect) -> Lender:
    return Lender(connect)


async def test_those_who_ask_meanwhile_share_one_statement(ledger: Ledger, lender: Lender) -> None:
    ids = [await ledger.happen() for _ in range(5)]
    claims = Claims(lender, LEASE)
    taken = await asyncio.gather(*(claims.claim(each, uuid4()) for each in ids))
    assert [each and each.id for each in taken] == ids
    assert lender.loans == 1
    assert [await ledger.state(each) for each in ids] == ["running"] * 5


async def test_a_locked_row_holds_up_only_its_own_claim(ledger: Ledger, lender: Lender, connect: Connect) -> None:
    locked, free = await ledger.happen(), await ledger.happen()
    other = await connect()
    transaction = other.transaction()
    await transaction.start()
    await other.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", locked)
    claims = Claims(lender, LEASE)
    waits = asyncio.create_task(claims.claim(locked, uuid4()))
    async with asyncio.timeout(30):
        assert await claims.claim(free, uuid4())
    assert not waits.done()
    await transaction.commit()
    async with asyncio.timeout(30):
        assert await waits


async def test_a_worker_faster_than_the_dispatch_waits_for_it(ledger: Ledger, lender: Lender, connect: Connect) -> None:
    (message_id,) = await ledger.publish()
    relay = await connect()
    async with relay.transaction():
        await relay.execute("UPDATE outbox_message SET state = 'dispatched' WHERE id = $1", message_id)
        claim = asyncio.create_task(Claims(lender, LEASE).claim(message_id, uuid4()))
        await until(lambda: somebody_waits(ledger))
    assert await claim is not None


async def somebody_waits(ledger: Ledger) -> bool:
    waiting: int = await ledger.connection.fetchval(
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
        "WHERE NOT granted AND datname = current_database()"
    )
    return waiting > 0


async def test_one_rows_second_claim_and_anothers_are_told_apart(ledger: Ledger, lender: Lender) -> None:
    message_id, token = await ledger.happen(), uuid4()
    claims = Claims(lender, LEASE)
    first = await claims.claim(message_id, token)
    again, others = await asyncio.gather(claims.claim(message_id, token), claims.claim(message_id, uuid4()))
    assert first is not None
    assert again is not None
    assert (first.attempts, again.attempts) == (1, 1)
    assert others is None


@pytest.mark.parametrize(("dispatches", "waits"), [((1, 1), "off"), ((1, 2), "on"), ((2, 2), "on")])
async def test_a_claim_from_the_second_dispatch_on_is_on_disk(
    ledger: Ledger, connect: Connect, dispatches: tuple[int, int], waits: str
) -> None:
    ids = [await ledger.happen() for _ in dispatches]
    for message_id, count in zip(ids, dispatches, strict=True):
        await ledger.set(message_id, dispatches=count)
    worker = await connect()
    await worker.execute("SET synchronous_commit = 'on'")
    async with worker.transaction():
        assert len(await delivering.claim_free(worker, [(each, uuid4()) for each in ids], LEASE)) == 2
        assert await worker.fetchval("SHOW synchronous_commit") == waits


@pytest.fixture
async def patient_runner(settings: Settings, worker_engine: AsyncEngine) -> AsyncIterator[Runner]:
    """One whose claims may wait for a long time."""
    settings.outbox.lease = 60
    runner = Runner(settings, worker_engine)
    await runner.open()
    yield runner
    await runner.close()


async def test_more_locked_rows_than_connections_hold_up_nobody_else(
    ledger: Ledger, patient_runner: Runner, connect: Connect
) -> None:
    deliver = patient_runner.deliver
    locked = [await ledger.happen() for _ in range(8)]
    free = [await ledger.happen("outside") for _ in range(4)]
    other = await connect()
    async with other.transaction():
        await other.execute("SELECT FROM outbox_message WHERE id = ANY($1) FOR UPDATE", locked)
        waiting = [asyncio.create_task(deliver(each)) for each in locked]
        # Not asked on `other`: a transaction goes on seeing the sessions that were there when it first looked.
        await until(lambda: somebody_waits(ledger))
        async with asyncio.timeout(30):
            await asyncio.gather(*[deliver(each) for each in free])
        assert [await ledger.state(each) for each in free] == ["completed"] * 4
    await asyncio.gather(*waiting)
    assert [await ledger.state(each) for each in locked] == ["completed"] * 8


class Broken(Lender):
    """Fails once, in a way that no driver does."""

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[Connection]:
        async with super().__call__() as connection:
            if self.loans == 1:
                raise ValueError("odd")
            yield connection


async def test_whoever_asks_while_another_meets_an_odd_error_is_served(ledger: Ledger, connect: Connect) -> None:
    lender = Broken(connect)
    lender.lending.clear()
    claims = Claims(lender, LEASE)
    first = asyncio.create_task(claims.claim(await ledger.happen(), uuid4()))
    await until(lambda: lender.asked)
    second = asyncio.create_task(claims.claim(await ledger.happen(), uuid4()))
    lender.lending.set()
    with pytest.raises(ValueError, match="odd"):
        await first
    async with asyncio.timeout(30):
        assert await second


async def test_an_error_reaches_everybody_who_asked(ledger: Ledger, lender: Lender) -> None:
    ids: list[UUID] = [await ledger.happen() for _ in range(2)]
    claims = Claims(lender, LEASE)
    lender.lending.clear()
    asked = [asyncio.create_task(claims.claim(each, uuid4())) for each in ids]
    await ledger.connection.execute("ALTER TABLE outbox_message RENAME TO elsewhere")
    try:
        lender.lending.set()
        errors = await asyncio.gather(*asked, return_exceptions=True)
    finally:
        await ledger.connection.execute("ALTER TABLE elsewhere RENAME TO outbox_message")
    assert ["outbox_message" in str(each) for each in errors] == [True, True]
    assert await claims.claim(ids[0], uuid4())
