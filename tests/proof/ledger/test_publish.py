"""Publishing: in the caller's transaction or not at all, and refusals that say what to do."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.database.engine import create_engine
from service.database.sessions import OneTransaction, session_factory, transaction
from service.errors import ConsumerDefinitionError, EventDefinitionError, PublishError
from service.outbox import Event, accept, consumer, publish
from service.outbox.consumers import consumers_of
from service.outbox.payloads import MAX_PAYLOAD_BYTES
from service.outbox.publish import MAX_DELAY
from service.telemetry.logs import trace_context
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from service.database.sessions import SessionFactory
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


def event() -> domain.Happened:
    return domain.Happened(subject_id=uuid4())


async def count(ledger: Ledger) -> int:
    return int(await ledger.connection.fetchval("SELECT count(*) FROM outbox_message"))


async def test_an_event_exists_once_its_transaction_committed(ledger: Ledger, sessions: SessionFactory) -> None:
    async with sessions() as session:
        publish(session, event())
        await session.flush()
        assert await count(ledger) == 0
        await session.commit()
    assert await count(ledger) == 1


async def test_an_event_goes_with_its_rolled_back_transaction(ledger: Ledger, sessions: SessionFactory) -> None:
    with pytest.raises(RuntimeError):
        async with transaction(sessions) as session:
            publish(session, event())
            raise RuntimeError
    assert await count(ledger) == 0


async def test_an_event_goes_with_its_rolled_back_savepoint(ledger: Ledger, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        publish(session, event())
        with pytest.raises(RuntimeError):
            async with session.begin_nested():
                publish(session, event())
                raise RuntimeError
    assert await count(ledger) == 1


async def test_a_request_that_publishes_what_nobody_consumes_commits(settings: Settings) -> None:
    """Its transaction has begun, and no statement has been sent in it."""
    engine = create_engine(settings.database, application_name="tests")
    async with transaction(session_factory(engine, OneTransaction)) as session:
        publish(session, domain.Ignored(subject_id=uuid4()))
    await engine.dispose()


async def test_the_boundary_notices_a_swallowed_database_error(ledger: Ledger, sessions: SessionFactory) -> None:
    """PostgreSQL answers the COMMIT of an aborted transaction with a ROLLBACK, and no driver raises."""

    async def handle() -> None:
        async with transaction(sessions) as session:
            publish(session, event())
            await session.flush()
            with suppress(DBAPIError):
                await session.execute(text("SELECT 1/0"))

    with pytest.raises(DBAPIError):
        await handle()
    assert await count(ledger) == 0


async def test_one_row_per_consumer_next_to_the_events_id(ledger: Ledger) -> None:
    ids = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    rows = await ledger.connection.fetch("SELECT id, event_id, consumer, queue FROM outbox_message ORDER BY id")
    assert [(row["consumer"], row["queue"]) for row in rows] == [("ledger.first", "ledger"), ("ledger.second", "other")]
    assert [row["id"].int - row["event_id"].int for row in rows] == [1, 2]
    assert all(each.version == 7 for each in ids)


async def test_the_row_holds_what_the_consumer_needs(ledger: Ledger) -> None:
    subject_id = uuid4()
    trace = {"correlation_id": "request-1", "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"}
    with trace_context(trace):
        (message_id,) = await ledger.publish(domain.Happened(subject_id=subject_id))
    row = await ledger.row(message_id)
    assert row is not None
    assert json.loads(row["payload"]) == {"subject_id": str(subject_id), "how": "", "raw": False}
    assert json.loads(row["headers"]) == trace
    assert (row["event_type"], row["version"], row["state"], row["attempts"]) == ("ledger.happened", 1, "pending", 0)
    assert -5 < row["due_in"] <= 0


async def test_a_delay_is_counted_by_the_database(ledger: Ledger) -> None:
    (message_id,) = await ledger.publish(delay=timedelta(minutes=5))
    row = await ledger.row(message_id)
    assert row is not None
    assert 295 < row["due_in"] <= 300


@pytest.mark.parametrize("delay", [timedelta(seconds=-1), MAX_DELAY + timedelta(seconds=1)])
async def test_an_impossible_delay_is_refused(ledger: Ledger, delay: timedelta) -> None:
    with pytest.raises(PublishError, match="delay must be"):
        await ledger.publish(delay=delay)
    assert await count(ledger) == 0


async def test_due_times_follow_the_clock_not_the_transactions_start(ledger: Ledger, sessions: SessionFactory) -> None:
    """With `now()` most rows of a long transaction would lie below the relay's floor."""
    async with transaction(sessions) as session:
        publish(session, event())
        await session.flush()
        await session.execute(text("SELECT pg_sleep(0.2)"))
        publish(session, event())
    first, second = await ledger.connection.fetch("SELECT due_at FROM outbox_message ORDER BY due_at")
    assert second["due_at"] - first["due_at"] > timedelta(seconds=0.15)


async def test_an_event_nobody_consumes_is_refused(sessions: SessionFactory) -> None:
    class Orphaned(Event, type="ledger.orphaned"):
        subject_id: UUID

    async with sessions() as session:
        with pytest.raises(PublishError, match="unconsumed=True"):
            publish(session, Orphaned(subject_id=uuid4()))


async def test_an_event_declared_unconsumed_writes_nothing(ledger: Ledger, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        publish(session, domain.Ignored(subject_id=uuid4()))
    assert await count(ledger) == 0


async def test_none_for_an_id_is_refused(sessions: SessionFactory) -> None:
    class Loose(Event, type="ledger.loose", unconsumed=True):
        subject_id: UUID | None

    async with sessions() as session:
        with pytest.raises(PublishError, match=r"subject_id is None.*new_id\(\)"):
            publish(session, Loose(subject_id=None))


async def test_an_oversize_payload_is_refused(ledger: Ledger) -> None:
    with pytest.raises(PublishError, match="store the data in a row"):
        await ledger.publish(domain.Happened(subject_id=uuid4(), how="x" * MAX_PAYLOAD_BYTES))


async def test_something_else_than_an_event_is_refused(sessions: SessionFactory) -> None:
    async with sessions() as session:
        with pytest.raises(PublishError, match="instance of an Event class"):
            publish(session, {"order_id": 1})  # type: ignore[arg-type]


async def test_a_closed_session_is_refused(sessions: SessionFactory) -> None:
    """It would take the event, and nobody would ever commit it."""
    async with sessions() as session:
        pass
    with pytest.raises(PublishError, match="closed"):
        publish(session, event())


async def test_a_failed_session_is_refused(sessions: SessionFactory, ledger: Ledger) -> None:
    (message_id,) = await ledger.publish()
    async with sessions() as session:
        session.add(domain_row(message_id))
        with pytest.raises(DBAPIError):
            await session.flush()
        with pytest.raises(PublishError, match="has failed"):
            publish(session, event())


def domain_row(message_id: UUID) -> object:
    from service.ledger.tables import OutboxMessage

    return OutboxMessage(
        id=message_id, event_id=uuid4(), event_type="t", version=1, consumer="c", queue="q", payload={}, headers={}
    )


async def test_an_autocommit_session_is_refused(ledger: Ledger, settings: Settings) -> None:
    engine = create_engine(settings.database, application_name="t").execution_options(isolation_level="AUTOCOMMIT")
    try:
        async with session_factory(engine)() as session:
            publish(session, event())
            with pytest.raises(PublishError, match="AUTOCOMMIT"):
                await session.flush()
    finally:
        await engine.dispose()
    assert await count(ledger) == 0


async def test_accept_refuses_an_autocommit_session(ledger: Ledger, settings: Settings) -> None:
    """The key would be taken for good before the event exists."""
    engine = create_engine(settings.database, application_name="t").execution_options(isolation_level="AUTOCOMMIT")
    try:
        async with session_factory(engine)() as session:
            with pytest.raises(PublishError, match="AUTOCOMMIT"):
                await accept(session, "sender:1", event())
    finally:
        await engine.dispose()
    assert not await ledger.connection.fetchval("SELECT count(*) FROM accepted_event")


@pytest.mark.parametrize("annotation", [list[UUID], dict[str, str], object, domain.Happened])
def test_an_event_holds_ids_and_scalars_only(annotation: object) -> None:
    with pytest.raises(EventDefinitionError, match="IDs and small scalars"):
        type("Fat", (Event,), {"__annotations__": {"data": annotation}, "__module__": __name__}, type="ledger.fat")


@pytest.mark.parametrize("name", ["OrderPlaced", "order placed", "order", "", "ORDER.placed"])
def test_an_events_name_is_dotted(name: str) -> None:
    with pytest.raises(EventDefinitionError, match="dotted name"):
        type("Badly", (Event,), {"__module__": __name__}, type=name)


def test_a_taken_event_name_is_refused() -> None:
    with pytest.raises(EventDefinitionError, match="already the type of"):
        type("Other", (Event,), {"__module__": __name__}, type="ledger.happened")


def test_a_taken_consumer_name_is_refused() -> None:
    with pytest.raises(ConsumerDefinitionError, match="already the name of"):

        @consumer(domain.Happened, queue="ledger", name="ledger.react")
        async def another(event: object, delivery: object) -> None: ...


def test_a_consumer_takes_event_and_delivery() -> None:
    with pytest.raises(ConsumerDefinitionError, match="exactly"):

        @consumer(domain.Happened, queue="ledger", name="ledger.short")
        async def short(event: object) -> None: ...

    assert [each.name for each in consumers_of(domain.Happened)] == ["ledger.react"]


async def test_accept_takes_a_key_once(ledger: Ledger, sessions: SessionFactory) -> None:
    taken = []
    for _ in range(2):
        async with transaction(sessions) as session:
            taken.append(await accept(session, "sender:1", event()))
    assert taken == [True, False]
    assert await count(ledger) == 1


async def test_accept_waits_for_a_rival_and_takes_over_when_it_rolls_back(
    ledger: Ledger, sessions: SessionFactory
) -> None:
    async with sessions() as rival, sessions() as session:
        assert await accept(rival, "sender:1", event())
        waiting = asyncio.create_task(accept(session, "sender:1", event()))
        await asyncio.sleep(0)
        await rival.rollback()
        assert await waiting
        await session.commit()
    assert await count(ledger) == 1


@pytest.mark.parametrize("key", ["", "k" * 256, "sender:\x00", "sender:\udcff"])
async def test_accept_refuses_a_bad_key(sessions: SessionFactory, key: str) -> None:
    async with sessions() as session:
        with pytest.raises(PublishError, match="1 to 255"):
            await accept(session, key, event())
