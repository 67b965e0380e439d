"""`@scheduled` refuses at import what would fail at night."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from uuid import UUID

import pytest

from service.errors import ScheduleError
from service.outbox import Event, scheduled
from service.outbox.schedules.definitions import declared
from tests.proof.schedules.domain import Beat, Unheard

pytestmark = pytest.mark.usefixtures("nothing_declared")


class Needy(Event, type="schedules.needy"):
    scheduled_at: datetime
    user_id: UUID


class Dated(Event, type="schedules.dated"):
    scheduled_at: date


def test_a_schedule_is_named_after_its_event() -> None:
    assert scheduled("0 3 * * *", tz="Europe/Berlin")(Beat) is Beat
    (found,) = declared()
    assert (found.name, found.queue, found.tz, found.catch_up) == ("schedules.beat", "beats", "Europe/Berlin", "latest")


def test_an_event_may_have_several_with_names_of_their_own() -> None:
    scheduled("0 3 * * *", name="night")(Beat)
    scheduled(every=timedelta(hours=1), name="hourly")(Beat)
    assert [each.name for each in declared()] == ["hourly", "night"]
    with pytest.raises(ScheduleError, match="there is a schedule named 'night' already"):
        scheduled("0 4 * * *", name="night")(Beat)
    with pytest.raises(ScheduleError, match="there is a schedule named 'night' already"):
        scheduled("0 4 * * *", name="night")(Unheard)


def test_an_event_must_be_complete_without_anybody() -> None:
    with pytest.raises(ScheduleError, match=r"Needy\.user_id has no default"):
        scheduled("0 3 * * *")(Needy)
    with pytest.raises(ScheduleError, match=r"Dated\.scheduled_at must be a datetime"):
        scheduled("0 3 * * *")(Dated)


def test_an_event_that_nobody_consumes_is_found_out_when_a_worker_starts() -> None:
    scheduled("0 3 * * *")(Unheard)
    with pytest.raises(ScheduleError, match=r"nobody consumes 'schedules\.unheard'"):
        declared()


def test_what_could_not_fire_is_refused_by_the_import() -> None:
    with pytest.raises(ScheduleError, match="not the five fields"):
        scheduled("0 0 3 * * *")
    with pytest.raises(ScheduleError, match="catch_up is one of"):
        scheduled("0 3 * * *", catch_up="some")
