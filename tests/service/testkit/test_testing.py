"""What the test kit tells a test, and that it notices what is wrong."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from service.database.sessions import transaction
from service.outbox import new_id, publish, testing
from service.outbox.testing import (
    InlineWorker,
    assert_not_published,
    assert_published,
    inline_worker,
    published,
)
from service.telemetry.logs import trace_context
from tests.service.testkit.shop import (
    DONE,
    LET_GO,
    Announced,
    Arrived,
    Echoed,
    Failing,
    Forgotten,
    Hanging,
    Loaded,
    Weighed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from service.database.sessions import SessionFactory
    from service.settings import Settings


@pytest.fixture
async def worker(settings: Settings, engine: AsyncEngine) -> AsyncIterator[InlineWorker]:
    DONE.clear()
    async with inline_worker(settings, engine) as worker:
        yield worker


async def test_a_session_sees_what_it_published_before_any_commit(rolled_back_session: AsyncSession) -> None:
    first, second = Arrived(parcel_id=new_id()), Arrived(parcel_id=new_id(), pieces=2)
    publish(rolled_back_session, first)
    publish(rolled_back_session, second)
    # Two consumers, but one event each.
    assert await published(rolled_back_session, Arrived) == [first, second]
    assert await assert_published(rolled_back_session, Arrived, pieces=2) == second
    await assert_not_published(rolled_back_session, Arrived, pieces=3)
    await assert_not_published(rolled_back_session, Announced)


async def test_a_connection_sees_what_was_committed(sessions: SessionFactory, engine: AsyncEngine) -> None:
    event = Arrived(parcel_id=new_id())
    async with transaction(sessions) as session:
        publish(session, event)
        async with engine.connect() as connection:
            await assert_not_published(connection, Arrived)
    async with engine.connect() as connection:
        assert await assert_published(connection, Arrived, parcel_id=event.parcel_id) == event


async def test_what_sql_publishes_is_delivered_like_any_other(sessions: SessionFactory, worker: InlineWorker) -> None:
    """The step in between is not the test's concern."""
    sql = text("SELECT outbox_publish('testkit.announced', jsonb_build_object('parcel_id', gen_random_uuid()), 'q')")
    for only in (None, "testkit.announce"):
        async with transaction(sessions) as session:
            await session.execute(sql)
        assert await worker.deliver_all(only) == ["testkit.announce"]


async def test_what_follows_is_delivered_after_all_others(sessions: SessionFactory, worker: InlineWorker) -> None:
    async with transaction(sessions) as session:
        publish(session, Arrived(parcel_id=new_id()), then=Weighed(parcel_id=new_id(), grams=7))
        await assert_published(session, Weighed)
    assert await worker.deliver_all("testkit.store") == ["testkit.store"]
    await worker.make_due()  # what waits for others stays
    assert (await worker.deliver_all())[-1] == "testkit.weigh"
    assert DONE[1] == "count 1"
    async with sessions() as session:
        await assert_published(session, Weighed)


async def test_the_assertions_fail(rolled_back_session: AsyncSession) -> None:
    publish(rolled_back_session, Arrived(parcel_id=new_id()))
    publish(rolled_back_session, Arrived(parcel_id=new_id()))
    with pytest.raises(AssertionError, match=r"expected one Arrived\(pieces=2\), found 0 among \[Arrived"):
        await assert_published(rolled_back_session, Arrived, pieces=2)
    with pytest.raises(AssertionError, match=r"expected one Arrived\(pieces=1\), found 2"):
        await assert_published(rolled_back_session, Arrived, pieces=1)
    with pytest.raises(AssertionError, match=r"expected no Arrived\(\), found"):
        await assert_not_published(rolled_back_session, Arrived)


async def test_a_misspelt_field_never_passes(rolled_back_session: AsyncSession) -> None:
    publish(rolled_back_session, Arrived(parcel_id=new_id()))
    with pytest.raises(AssertionError, match="Arrived has no field peaces"):
        await assert_not_published(rolled_back_session, Arrived, peaces=1)


async def test_an_event_without_consumers_leaves_no_trace(rolled_back_session: AsyncSession) -> None:
    publish(rolled_back_session, Forgotten(parcel_id=new_id()))
    with pytest.raises(AssertionError, match=r"nobody consumes 'testkit\.forgotten'"):
        await assert_not_published(rolled_back_session, Forgotten)


async def test_everything_due_is_run_with_what_follows_from_it(worker: InlineWorker, sessions: SessionFactory) -> None:
    event = Arrived(parcel_id=new_id())
    async with transaction(sessions) as session:
        publish(session, event)
    assert await worker.deliver_all() == ["testkit.store", "testkit.count", "testkit.announce"]
    assert ["store", "count 1", f"announce {event.parcel_id}"] == DONE
    assert await worker.deliver_all() == []


async def test_what_succeeds_is_one_line_in_the_log(worker: InlineWorker) -> None:
    with capture_logs(processors=[merge_contextvars]) as logs, trace_context({"correlation_id": "abc"}):
        await worker.deliver(Arrived(parcel_id=new_id()))
    lines = [each for each in logs if each["event"] == "outbox.completed"]
    assert [each["consumer"] for each in lines] == ["testkit.store", "testkit.count"]  # within begin(), and outside
    for each in lines:
        assert (each["log_level"], each["attempt"], each["correlation_id"]) == ("info", 1, "abc")
        assert each["duration_ms"] > 0
        assert each["delivery_id"]


async def test_one_consumer_alone(worker: InlineWorker, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        publish(session, Arrived(parcel_id=new_id()))
    assert await worker.deliver_all("testkit.count") == ["testkit.count"]
    assert DONE == ["count 1"]
    with pytest.raises(AssertionError, match=r"no consumer named 'testkit\.cuont'"):
        await worker.deliver_all("testkit.cuont")


async def test_an_event_is_published_and_delivered_at_once(worker: InlineWorker, sessions: SessionFactory) -> None:
    event = Arrived(parcel_id=new_id())
    assert await worker.deliver(event, to="testkit.count") == ["testkit.count"]
    assert await worker.deliver(event) == ["testkit.store", "testkit.count"]
    async with sessions() as session:
        await assert_published(session, Announced, parcel_id=event.parcel_id)


async def test_a_delayed_event_waits_until_it_is_made_due(worker: InlineWorker) -> None:
    await worker.deliver(Arrived(parcel_id=new_id()))
    assert await worker.deliver_all() == ["testkit.announce"]
    await worker.make_due()
    assert await worker.deliver_all() == ["testkit.announce"]


async def test_a_failure_fails_the_test_with_its_cause(worker: InlineWorker) -> None:
    with pytest.raises(AssertionError, match=r"testkit\.fail is pending: RuntimeError: no luck today") as failure:
        await worker.deliver(Failing(parcel_id=new_id()))
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert failure.value.__cause__.__traceback__ is not None


async def test_a_failure_may_be_what_is_tested(worker: InlineWorker) -> None:
    assert await worker.deliver(Failing(parcel_id=new_id(), how="recovers"), may_fail=True) == ["testkit.fail"]
    assert await worker.deliver_all() == []
    await worker.make_due()
    assert await worker.deliver_all() == ["testkit.fail"]
    assert DONE == ["fail 1", "fail 2"]


async def test_a_retry_that_is_due_at_once_waits_for_the_next_call(worker: InlineWorker) -> None:
    await worker.deliver(Failing(parcel_id=new_id(), how="retry"), may_fail=True)
    assert DONE == ["fail 1"]
    await worker.make_due()
    await worker.deliver_all(may_fail=True)
    assert DONE == ["fail 1", "fail 2"]


async def test_a_dead_letter_fails_the_test_and_counts_as_published(
    worker: InlineWorker, sessions: SessionFactory
) -> None:
    event = Failing(parcel_id=new_id(), how="for good")
    with pytest.raises(AssertionError, match="is a dead letter: it is broken"):
        await worker.deliver(event)
    async with sessions() as session:
        assert await session.scalar(text("SELECT reason FROM dead_letter")) == "it is broken"
        await assert_published(session, Failing, parcel_id=event.parcel_id)


async def test_a_def_consumer_runs_like_in_a_worker(worker: InlineWorker, sessions: SessionFactory) -> None:
    assert await worker.deliver(Weighed(parcel_id=new_id(), grams=7)) == ["testkit.weigh"]
    assert DONE == ["weigh 7"]
    with pytest.raises(AssertionError, match="is a dead letter: failed 1 times") as failure:
        await worker.deliver(Weighed(parcel_id=new_id(), grams=0))
    assert str(failure.value.__cause__) == "nothing to weigh"
    async with sessions() as session:
        states = await session.scalars(text("SELECT state FROM outbox_message"))
        assert list(states) == ["completed"]


@pytest.mark.slow
async def test_a_def_consumer_that_hangs_fails_the_test(worker: InlineWorker) -> None:
    try:
        with pytest.raises(AssertionError, match=r"testkit\.hang has not come back for 3\.1 s"):
            await worker.deliver(Hanging(parcel_id=new_id()))
    finally:
        LET_GO.set()
        for thread in [each for each in threading.enumerate() if each.name == "testkit.hang"]:
            await asyncio.to_thread(thread.join)


async def test_an_endless_chain_ends(worker: InlineWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testing, "_MOST", 5)
    await worker.deliver(Echoed(parcel_id=new_id()))
    with pytest.raises(AssertionError, match=r"does testkit\.echo publish what it consumes\?"):
        await worker.deliver_all()


async def test_a_batch_consumer_is_handed_what_is_due_together(worker: InlineWorker, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        for _ in range(4):
            publish(session, Loaded(parcel_id=new_id()))
            publish(session, Announced(parcel_id=new_id()))
    assert (await worker.deliver_all()).count("testkit.load") == 4
    assert [each for each in DONE if each.startswith("load")] == ["load 3", "load 1"]


async def test_what_fails_in_a_batch_fails_the_test(worker: InlineWorker, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        publish(session, Loaded(parcel_id=new_id()))
        publish(session, Loaded(parcel_id=new_id(), fits=False))
    with pytest.raises(AssertionError, match=r"testkit\.load is pending: RuntimeError") as failure:
        await worker.deliver_all()
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert DONE == ["load 2", "load 1", "load 1"]
