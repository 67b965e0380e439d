"""An event that waits already is published once, and no change that it stands for is lost."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from service.database.engine import create_engine
from service.database.sessions import OneTransaction, session_factory, transaction
from service.errors import PublishError
from service.ledger.ids import event_of
from service.outbox import Delivery, Event, cancel, consumer, publish
from tests.proof.ledger import domain
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.database.sessions import SessionFactory
    from service.outbox.running.runner import Runner
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

SUBJECT = uuid4()
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)


class Changed(Event, type="ledger.changed"):
    """Its consumer notes which change of the subject it has seen."""

    subject_id: UUID


@consumer(Changed, queue="ledger", name="ledger.follow")
async def follow(event: Changed, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        number = await session.scalar(text("SELECT number FROM subject WHERE id = :id"), {"id": event.subject_id})
        await domain.write_effect(session, delivery, str(number))


@pytest.fixture
async def requests(settings: Settings, ledger: Ledger) -> AsyncIterator[SessionFactory]:
    """Sessions as requests have them."""
    await ledger.connection.execute("CREATE TABLE subject (id uuid PRIMARY KEY, number int NOT NULL)")
    engine = create_engine(settings.database, application_name="requests")
    yield session_factory(engine, OneTransaction)
    await engine.dispose()


async def change(requests: SessionFactory, subject_id: UUID = SUBJECT, **options: Any) -> UUID:
    """Change the subject, and publish that; the event's id."""
    async with transaction(requests) as session:
        return await change_in(session, subject_id, **options)


async def change_in(session: Any, subject_id: UUID = SUBJECT, **options: Any) -> UUID:
    await session.execute(
        text("INSERT INTO subject VALUES (:id, 1) ON CONFLICT (id) DO UPDATE SET number = subject.number + 1"),
        {"id": subject_id},
    )
    event_id = publish(session, Changed(subject_id=subject_id), **({"unique": True} | options))
    await session.flush()
    return event_id


async def waiting(ledger: Ledger) -> list[UUID]:
    rows = await ledger.connection.fetch("SELECT id FROM outbox_message WHERE state <> 'completed' ORDER BY id")
    return [row["id"] for row in rows]


async def due_in(ledger: Ledger) -> float:
    """Seconds until the one that waits is due."""
    (message_id,) = await waiting(ledger)
    row = await ledger.row(message_id)
    assert row is not None
    return float(row["due_in"])


async def seen(ledger: Ledger) -> list[str]:
    return [row["note"] for row in await ledger.connection.fetch("SELECT note FROM effect ORDER BY note::int")]


@pytest.mark.parametrize("state", ["pending", "dispatched"])
async def test_one_that_waits_stands_for_both(
    ledger: Ledger, requests: SessionFactory, runner: Runner, state: str
) -> None:
    first = await change(requests)
    (message_id,) = await waiting(ledger)
    await ledger.set(message_id, state=state)
    await change(requests)
    assert [event_of(each) for each in await waiting(ledger)] == [first]
    await runner.deliver(message_id)
    assert await seen(ledger) == ["2"]


async def test_in_one_transaction_too(ledger: Ledger, requests: SessionFactory) -> None:
    async with transaction(requests) as session:
        await change_in(session)
        await change_in(session)
    assert len(await waiting(ledger)) == 1


async def test_other_fields_are_another_event(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests)
    await change(requests, uuid4())
    assert len(await waiting(ledger)) == 2


async def test_it_is_stored_beside_one_that_is_not_unique(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests, unique=False)
    await change(requests)
    assert len(await waiting(ledger)) == 2


async def test_each_consumer_has_one(ledger: Ledger, requests: SessionFactory, runner: Runner) -> None:
    event = domain.FannedOut(subject_id=uuid4())
    for _ in range(2):
        async with transaction(requests) as session:
            publish(session, event, unique=True)
    first, second = await waiting(ledger)
    await runner.deliver(first)
    async with transaction(requests) as session:
        publish(session, event, unique=True)
    assert len(await waiting(ledger)) == 2
    assert second in await waiting(ledger)


async def test_what_is_over_or_cancelled_stands_for_nothing(
    ledger: Ledger, requests: SessionFactory, runner: Runner
) -> None:
    await change(requests)
    (message_id,) = await waiting(ledger)
    await runner.deliver(message_id)
    event_id = await change(requests)
    async with transaction(requests) as session:
        assert await cancel(session, event_id)
    assert await waiting(ledger) == []
    await change(requests)
    assert len(await waiting(ledger)) == 1


async def test_a_retry_waits_beside_the_next_one(ledger: Ledger, requests: SessionFactory, runner: Runner) -> None:
    """It has begun, so it stands for nothing any more; and it must be able to come back."""
    event = domain.Happened(subject_id=SUBJECT, how="fail")
    for expected in (1, 2, 2):
        async with transaction(requests) as session:
            publish(session, event, unique=True)
        assert len(await waiting(ledger)) == expected
        if expected == 1:
            (message_id,) = await waiting(ledger)
            await runner.deliver(message_id)
            assert await ledger.state(message_id) == "pending"


async def test_a_run_that_fails_comes_back_while_the_next_one_waits(
    ledger: Ledger, requests: SessionFactory, runner: Runner
) -> None:
    event = domain.Gated(subject_id=SUBJECT)
    async with transaction(requests) as session:
        publish(session, event, unique=True)
    (message_id,) = await waiting(ledger)
    gate = domain.Gate()
    domain.GATES[str(message_id)] = [gate]
    run = asyncio.create_task(runner.deliver(message_id))
    await gate.reached.wait()
    async with transaction(requests) as session:
        publish(session, event, unique=True)
    runner._releasing = True  # as at the end of a shutdown's grace
    run.cancel()
    await asyncio.wait([run])
    await until(lambda: pending(ledger, 2))


async def pending(ledger: Ledger, count: int) -> bool:
    found = await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")
    return bool(found == count)


async def test_a_claim_waits_for_who_relies_on_it(ledger: Ledger, requests: SessionFactory, runner: Runner) -> None:
    """Or it would look before the change is committed that it stands for."""
    await change(requests)
    (message_id,) = await waiting(ledger)
    async with transaction(requests) as session:
        await change_in(session)
        run = asyncio.create_task(runner.deliver(message_id))
        await until(lambda: blocked(ledger))
    await run
    assert await seen(ledger) == ["2"]
    assert await waiting(ledger) == []


async def test_who_publishes_waits_for_a_claim_and_relies_on_nothing(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests)
    (message_id,) = await waiting(ledger)
    async with transaction(ledger.sessions) as worker:
        await worker.execute(
            text("UPDATE outbox_message SET state = 'running', started_at = clock_timestamp() WHERE id = :id"),
            {"id": message_id},
        )
        publishing = asyncio.create_task(change(requests))
        await until(lambda: blocked(ledger))
    await publishing
    assert len(await waiting(ledger)) == 2


async def test_who_rolls_back_leaves_the_one_that_waits(
    ledger: Ledger, requests: SessionFactory, runner: Runner
) -> None:
    await change(requests)
    with pytest.raises(RuntimeError):
        async with transaction(requests) as session:
            await change_in(session)
            raise RuntimeError
    (message_id,) = await waiting(ledger)
    await runner.deliver(message_id)
    assert await seen(ledger) == ["1"]


async def test_a_delay_is_at_most_one_in_that_time(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests, delay=MINUTE)
    first = await due_in(ledger)
    await change(requests, delay=2 * MINUTE)
    assert 0 < await due_in(ledger) <= first
    await change(requests)
    assert await due_in(ledger) <= 0


async def test_a_debounced_one_is_put_off_each_time(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests, delay=MINUTE, debounce=MINUTE * 5)
    await ledger.connection.execute(
        """UPDATE outbox_message SET due_at = due_at - interval '30 s', created_at = created_at - interval '30 s'"""
    )
    assert await due_in(ledger) < 31
    await change(requests, delay=MINUTE, debounce=MINUTE * 5)
    assert 55 < await due_in(ledger) <= 60


async def test_but_not_for_ever(ledger: Ledger, requests: SessionFactory) -> None:
    await change(requests, delay=MINUTE, debounce=MINUTE * 5)
    await ledger.connection.execute(
        """UPDATE outbox_message SET due_at = clock_timestamp() + interval '1 s',
           created_at = created_at - interval '4 min 30 s'"""
    )
    await change(requests, delay=MINUTE, debounce=MINUTE * 5)
    assert 20 < await due_in(ledger) <= 30


async def test_what_is_handed_over_is_not_put_off(ledger: Ledger, requests: SessionFactory) -> None:
    """Its message is in the broker, and its `due_at` says when it is handed over again."""
    await change(requests, delay=MINUTE, debounce=MINUTE * 5)
    (message_id,) = await waiting(ledger)
    await ledger.set(message_id, state="dispatched")
    before = await ledger.row(message_id)
    await change(requests, delay=2 * MINUTE, debounce=MINUTE * 5)
    after = await ledger.row(message_id)
    assert before is not None
    assert after is not None
    assert after["due_at"] == before["due_at"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"debounce": MINUTE}, "it needs a delay"),
        ({"delay": MINUTE, "debounce": SECOND}, "from that to"),
        ({"unique": True, "expires": MINUTE}, "cannot expire"),
    ],
)
async def test_what_makes_no_sense_is_refused(requests: SessionFactory, options: dict[str, Any], says: str) -> None:
    async with transaction(requests) as session:
        with pytest.raises(PublishError, match=says):
            publish(session, Changed(subject_id=SUBJECT), **options)


async def test_a_session_that_writes_objects_only_is_refused(ledger: Ledger) -> None:
    with pytest.raises(PublishError, match="OneTransaction"):
        await ledger.publish(Changed(subject_id=SUBJECT), unique=True)
