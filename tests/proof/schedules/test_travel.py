"""The test kit travels in time: schedules, delays and retries, each in its turn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from service.database.sessions import transaction
from service.outbox import Delivery, Event, Retry, consumer, publish, schedule, scheduled
from service.outbox.testing import InlineWorker, inline_worker, published

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.sessions import SessionFactory
    from service.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_declared")

SEEN: list[str] = []


class Morning(Event, type="travel.morning"):
    scheduled_at: datetime


class Evening(Event, type="travel.evening"):
    of: datetime


class Noon(Event, type="travel.noon"):
    scheduled_at: datetime | None = None


@consumer(Morning, queue="travel", name="travel.rise")
async def rise(event: Morning, delivery: Delivery) -> None:
    async with delivery.begin() as session:
        publish(session, Evening(of=event.scheduled_at), delay=timedelta(hours=12))
    SEEN.append(f"rise {event.scheduled_at.astimezone(UTC):%H:%M}")


@consumer(Evening, queue="travel", name="travel.rest")
async def rest(event: Evening, delivery: Delivery) -> None:
    SEEN.append(f"rest {event.of.astimezone(UTC):%H:%M}")


@consumer(Noon, queue="travel", name="travel.eat", max_retries=2)
async def eat(event: Noon, delivery: Delivery) -> None:
    SEEN.append(f"eat {delivery.attempt}")
    if delivery.attempt == 1:
        raise Retry("not yet", delay=3_600_000)


@pytest.fixture
async def worker(settings: Settings, engine: AsyncEngine) -> AsyncIterator[InlineWorker]:
    SEEN.clear()
    async with inline_worker(settings, engine) as worker:
        yield worker


async def test_a_week_has_seven_mornings_and_each_its_evening(worker: InlineWorker) -> None:
    scheduled("0 6 * * *")(Morning)
    ran = await worker.travel(timedelta(days=7))
    assert ran.count("travel.rise") == 7
    # The last evening may be after the week.
    days = SEEN if SEEN[0] == "rise 06:00" else SEEN[1:]
    assert days[:13] == ["rise 06:00", "rest 06:00"] * 6 + ["rise 06:00"]
    assert await worker.travel(timedelta(days=1)) != []
    assert SEEN.count("rise 06:00") == 8


async def test_the_events_are_of_the_time_that_was_reached(worker: InlineWorker, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        first = await schedule(session, "hourly", Noon(), every=timedelta(hours=1))
    await worker.travel(timedelta(hours=2, minutes=30), may_fail=True)
    async with sessions() as session:
        times = [each.scheduled_at for each in await published(session, Noon)]
    assert times == [first, first + timedelta(hours=1)]


async def test_a_retry_and_a_delay_take_their_time(worker: InlineWorker, sessions: SessionFactory) -> None:
    await worker.travel(timedelta(days=1))
    async with transaction(sessions) as session:
        publish(session, Noon(), delay=timedelta(minutes=30))
        publish(session, Evening(of=datetime(2026, 1, 1, tzinfo=UTC)), delay=timedelta(minutes=60))
    assert await worker.travel(timedelta(minutes=29)) == []
    assert await worker.travel(timedelta(minutes=2), may_fail=True) == ["travel.eat"]
    assert await worker.travel(timedelta(minutes=58), may_fail=True) == ["travel.rest"]
    assert await worker.travel(timedelta(minutes=5)) == ["travel.eat"]
    assert SEEN == ["eat 1", "rest 00:00", "eat 2"]


async def test_who_does_not_travel_meets_no_tick(worker: InlineWorker, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        await schedule(session, "hourly", Noon(), every=timedelta(hours=1))
    await worker.make_due()
    assert await worker.deliver_all() == []
