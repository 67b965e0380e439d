"""When schedules fire: clocks that are put forward and back, what is missed, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ScheduleError
from service.outbox.schedules.timing import Timing, fire

BERLIN = ZoneInfo("Europe/Berlin")
ANCHOR = datetime(2026, 1, 1, tzinfo=UTC)


def ticks(timing: Timing, start: datetime, count: int) -> list[str]:
    """The first ticks after `start`, in UTC."""
    found = [start]
    for _ in range(count):
        found.append(timing.after(found[-1], ANCHOR))
    return [f"{each:%d. %H:%M}" for each in found[1:]]


@pytest.mark.parametrize(
    ("cron", "start", "expected"),
    [
        ("30 2 * * *", datetime(2026, 3, 28, 12, tzinfo=BERLIN), ["29. 01:00", "30. 00:30"]),
        ("0 3 * * *", datetime(2026, 3, 28, 12, tzinfo=BERLIN), ["29. 01:00", "30. 01:00"]),
        ("*/30 * * * *", datetime(2026, 3, 29, 0, 30, tzinfo=UTC), ["29. 01:00", "29. 01:30"]),
        ("30 2 * * *", datetime(2026, 10, 24, 12, tzinfo=BERLIN), ["25. 00:30", "26. 01:30"]),
        ("*/30 * * * *", datetime(2026, 10, 25, 0, 0, tzinfo=UTC), ["25. 00:30", "25. 01:00", "25. 01:30"]),
        ("0 * * * *", datetime(2026, 10, 25, 0, 0, tzinfo=UTC), ["25. 01:00", "25. 02:00"]),
        # Made in the second of the two hours: a quarter to three was before that.
        ("45 2 * * *", datetime(2026, 10, 25, 1, 30, tzinfo=UTC), ["26. 01:45", "27. 01:45"]),
        ("0 0 31 * *", datetime(2026, 1, 31, 12, tzinfo=BERLIN), ["30. 22:00", "30. 22:00"]),
        ("0 0 29 2 *", datetime(2026, 1, 31, 12, tzinfo=BERLIN), ["28. 23:00", "28. 23:00"]),
        ("0 9 * * MON-FRI", datetime(2026, 11, 27, 12, tzinfo=BERLIN), ["30. 08:00", "01. 08:00"]),
    ],
    ids=[
        "an hour that is skipped", "at its end", "often, when it is skipped", "an hour that is repeated",
        "often, when it is repeated", "hourly", "made in the repeated hour", "a short month", "a leap day", "weekdays",
    ],
)  # fmt: skip
def test_a_cron_expression_follows_the_clock_on_the_wall(cron: str, start: datetime, expected: list[str]) -> None:
    assert ticks(Timing(cron, None, "Europe/Berlin"), start, len(expected)) == expected


def test_a_start_in_another_zone_is_the_same_moment() -> None:
    timing = Timing("0 3 * * *", None, "America/New_York")
    assert ticks(timing, datetime(2026, 7, 1, 12, tzinfo=UTC), 1) == ["02. 07:00"]
    assert ticks(timing, datetime(2026, 7, 1, 12, tzinfo=UTC).astimezone(BERLIN), 1) == ["02. 07:00"]


def test_an_interval_keeps_to_its_grid_whatever_the_clocks_do() -> None:
    timing = Timing(None, timedelta(hours=5))
    assert ticks(timing, datetime(2026, 1, 1, 4, 59, tzinfo=UTC), 2) == ["01. 05:00", "01. 10:00"]
    assert ticks(timing, datetime(2026, 1, 1, 5, 0, tzinfo=UTC), 1) == ["01. 10:00"]


CRONS = ("30 2 * * *", "0,15,45 1-3 * * *", "*/20 * * * *", "0 * * * *", "15 2 25 10 *", "0 4 * * SUN", "59 23 L * *")
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kathmandu")
MOMENTS = st.datetimes(datetime(2011, 12, 25), datetime(2028, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
NEAR_A_CHANGE = st.sampled_from(
    [datetime(2026, 10, 25, tzinfo=UTC), datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 11, 1, 5, tzinfo=UTC)]
).flatmap(lambda day: st.integers(-300, 300).map(lambda minutes: day + timedelta(minutes=minutes)))


@settings(deadline=None)
@given(cron=st.sampled_from(CRONS), tz=st.sampled_from(ZONES), start=MOMENTS | NEAR_A_CHANGE)
def test_ticks_are_apart_and_in_order(cron: str, tz: str, start: datetime) -> None:
    timing = Timing(cron, None, tz)
    found = [start]
    for _ in range(6):
        found.append(timing.after(found[-1], ANCHOR))
    assert all(one < other for one, other in pairwise(found)), found


@settings(deadline=None)
@given(
    cron=st.sampled_from(CRONS),
    tz=st.sampled_from(ZONES),
    start=MOMENTS | NEAR_A_CHANGE,
    late=st.timedeltas(timedelta(0), timedelta(days=20)),
)
def test_the_latest_is_the_last_of_all(cron: str, tz: str, start: datetime, late: timedelta) -> None:
    timing = Timing(cron, None, tz)
    first = timing.after(start, ANCHOR)
    every = [first]
    while (following := timing.after(every[-1], ANCHOR)) <= first + late:
        every.append(following)
    assert timing.latest(first, first + late, ANCHOR) == every[-1]


HOURLY = Timing(None, timedelta(hours=1))


@pytest.mark.parametrize(
    ("catch_up", "late", "skip", "fired", "following"),
    [
        ("latest", 0, False, [1], 2),
        ("latest", 3.5, False, [4], 5),
        ("latest", 0, True, [], 2),
        ("latest", 3.5, True, [4], 5),
        ("all", 0.9, False, [1], 2),
        ("all", 3.5, False, [1, 2, 3, 4], 5),
        ("all", 3.5, True, [2, 3, 4], 5),
        ("all", 250, False, [*range(1, 101)], 101),
        ("none", 0.9, False, [1], 2),
        ("none", 3.5, False, [], 5),
        ("none", 0.9, True, [], 2),
    ],
)
def test_what_was_missed_is_caught_up_with_as_asked(
    catch_up: str, late: float, skip: bool, fired: list[int], following: int
) -> None:
    hours = [ANCHOR + timedelta(hours=number) for number in range(110)]
    done = fire(HOURLY, catch_up, hours[1], hours[1] + timedelta(hours=late), ANCHOR, skip=skip)
    assert done.ticks == [hours[number] for number in fired]
    assert done.following == hours[following]


@pytest.mark.parametrize(
    ("cron", "every", "tz", "says"),
    [
        (None, None, "UTC", "either a cron expression"),
        ("0 3 * * *", timedelta(hours=1), "UTC", "either a cron expression"),
        ("0 0 3 * * *", None, "UTC", "not the five fields"),
        ("*/10 * * * * *", None, "UTC", "for seconds give every="),
        ("@daily", None, "UTC", "not the five fields"),
        ("", None, "UTC", "not the five fields"),
        ("61 3 * * *", None, "UTC", "Bad minute"),
        ("0 3 * * FUNDAY", None, "UTC", "Bad day-of-week"),
        ("0 0 30 2 *", None, "UTC", "Bad day-of-month"),
        ("0 0 * 2 MON#5,MON#6", None, "UTC", "Bad day-of-week"),
        ("0 3 * * *", None, "Europe/Nowhere", "no time zone of this machine"),
        ("0 3 * * *", None, "../../etc/passwd", "no time zone of this machine"),
        (None, timedelta(hours=1), "Europe/Berlin", "an interval has no time zone"),
        (None, timedelta(milliseconds=999), "UTC", "from 1 second"),
        (None, timedelta(days=367), "UTC", "to 366 days"),
    ],
)
def test_what_could_not_fire_as_it_says_is_refused(
    cron: str | None, every: timedelta | None, tz: str, says: str
) -> None:
    with pytest.raises(ScheduleError, match=says):
        Timing(cron, every, tz)


def test_an_expression_without_a_day_in_fifty_years_is_refused() -> None:
    # Where one of the days begins with a star, both must be met: a fifth Monday is never the 25th.
    with pytest.raises(ScheduleError, match="can never fire"):
        Timing("0 0 */8 * MON#5", None)
