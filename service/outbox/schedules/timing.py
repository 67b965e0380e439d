"""When a schedule fires: the ticks of a cron expression in a time zone, or of an interval.

What must stay true: the next tick follows from the last one, never from the time of a run, so a late worker moves
nothing; each tick is later than the one before it, also in the hour that the clocks repeat; and what could not fire, or
would fire sixty times as often as it looks, is refused before anything is stored.

Across a change of the clocks it is as in Debian's cron: what falls into the hour that is skipped fires at its end, and
what falls into the hour that is repeated fires in the first of the two, unless hour or minute begins with `*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from service.errors import ScheduleError

if TYPE_CHECKING:
    from datetime import tzinfo

LEAST, MOST = timedelta(seconds=1), timedelta(days=366)
"""Bounds of an interval."""

CATCH_UP = ("latest", "all", "none")

_AT_ONCE = 100
"""Events that one run publishes at most, when it catches up with all that was missed."""

_A_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Timing:
    """Either a cron expression with five fields and the zone that it is read in, or an interval.

    Raises:
        ScheduleError: it is neither, it can never fire, or it is not what it looks like.
    """

    cron: str | None
    every: timedelta | None
    tz: str = "UTC"

    def __post_init__(self) -> None:
        if (self.cron is None) == (self.every is None):
            raise ScheduleError('a schedule has either a cron expression ("0 3 * * *") or every=timedelta(...)')
        if self.every is not None:
            if self.tz != "UTC":
                raise ScheduleError("an interval has no time zone: give a cron expression, or leave tz out")
            if not LEAST <= self.every <= MOST:
                raise ScheduleError(f"every must be from 1 second to {MOST.days} days, not {self.every}")
            return
        zone = zone_of(self.tz)
        assert self.cron is not None
        if len(self.cron.split()) != 5:
            raise ScheduleError(
                f"{self.cron!r} has not the five fields of a cron expression (minute hour day month weekday): "
                "for seconds give every=timedelta(...)"
            )
        try:
            fires = next(CronSim(self.cron, datetime.now(zone)), None) is not None
        except CronSimError as error:
            raise ScheduleError(f"{self.cron!r} is no cron expression: {error}") from None
        if not fires:
            raise ScheduleError(f"{self.cron!r} can never fire: no year of the next 50 has such a day")

    def after(self, moment: datetime, anchor: datetime) -> datetime:
        """The first tick after a moment, in UTC.

        Args:
            moment: With a zone.
            anchor: What intervals are counted from.
        """
        if self.every is not None:
            return anchor + ((moment - anchor) // self.every + 1) * self.every
        assert self.cron is not None
        zone = zone_of(self.tz)
        # In the second of two equal hours it would go on from the first: it knows only what the clock on the wall says.
        for tick in CronSim(self.cron, moment.astimezone(zone)):
            if tick.astimezone(UTC) > moment:
                return tick.astimezone(UTC)
        raise ScheduleError(f"{self.cron!r} fires no more")

    def latest(self, first: datetime, now: datetime, anchor: datetime) -> datetime:
        """The last tick that is not after `now`, or `first`, which is one."""
        if self.every is not None:
            return max(first, anchor + (now - anchor) // self.every * self.every)
        assert self.cron is not None
        # What lies far back is skipped. A day is more than any change of the clocks.
        backwards = CronSim(self.cron, now.astimezone(zone_of(self.tz)), reverse=True)
        near = next(backwards, first).astimezone(UTC) - _A_DAY
        last, following = first, self.after(max(first, near), anchor)
        while following <= now:
            last, following = following, self.after(following, anchor)
        return last


def zone_of(name: str) -> tzinfo:
    """The time zone of that name in IANA's database.

    Raises:
        ScheduleError: this machine knows none.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ScheduleError(
            f"{name!r} is no time zone of this machine: expected one like Europe/Berlin, and the package tzdata"
        ) from None


@dataclass(frozen=True, slots=True)
class Fired:
    """What a run publishes, one event for each of these ticks, and the tick after them."""

    ticks: list[datetime]
    following: datetime


def fire(
    timing: Timing, catch_up: str, tick: datetime, now: datetime, anchor: datetime, *, skip: bool = False
) -> Fired:
    """What follows from a tick that runs now. A tick was missed when the next one was due before it ran.

    Args:
        timing: When it fires.
        catch_up: `all` that were missed, the `latest` alone, or `none`.
        tick: The one that runs.
        now: By PostgreSQL's clock.
        anchor: What intervals are counted from.
        skip: Somebody decided that this very tick is not to happen.
    """
    following = timing.after(tick, anchor)
    if catch_up == "all":
        ticks = [] if skip else [tick]
        while following <= now and len(ticks) < _AT_ONCE:
            ticks.append(following)
            following = timing.after(following, anchor)
        return Fired(ticks, following)
    if following > now:
        return Fired([] if skip else [tick], following)
    last = timing.latest(following, now, anchor)
    return Fired([last] if catch_up == "latest" else [], timing.after(last, anchor))
