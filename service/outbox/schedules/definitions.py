"""`@scheduled` and `schedule`: which event is published when.

What must stay true: what a schedule would fail with at night is refused where it is written: by the import, or by the
transaction that makes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from service.database.sessions import confirm
from service.errors import ScheduleError
from service.ledger import scheduling
from service.ledger.scheduling import Definition
from service.outbox.consumers import consumers_of
from service.outbox.events import Event
from service.outbox.publish import check_session, checked_payload, refuse_autocommit
from service.outbox.schedules.timing import CATCH_UP, Timing
from service.text import storable

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession

E = TypeVar("E", bound=Event)

AT = "scheduled_at"
"""The field that holds the time at which an event was to be published, if it has one."""


@dataclass(frozen=True, slots=True)
class _Declared:
    event: type[Event]
    timing: Timing
    catch_up: str


_DECLARED: dict[str, _Declared] = {}


def scheduled(
    cron: str | None = None,
    *,
    every: timedelta | None = None,
    tz: str = "UTC",
    catch_up: str = "latest",
    name: str | None = None,
) -> Callable[[type[E]], type[E]]:
    """Publish an event of this class whenever the time comes, once, however many processes run.

        @scheduled("0 3 * * *", tz="Europe/Berlin")
        class NightlyReport(Event, type="report.nightly"):
            scheduled_at: datetime

    Every field but `scheduled_at`, which need not be there, has a default.

    Args:
        cron: Five fields: minute, hour, day of the month, month, day of the week.
        every: An interval instead, from a second to 366 days.
        tz: The zone that `cron` is read in, by its name in IANA's database.
        catch_up: What is published of the times that passed while no worker ran: the `latest`, `all` or `none`.
        name: What `outbox schedules` calls it; by default the event's type.

    Raises:
        ScheduleError: it could never fire, or not as it says.
    """
    timing = Timing(cron, every, tz)
    _check_catch_up(catch_up)

    def register(event: type[E]) -> type[E]:
        chosen = _checked_name(name or event.event_type)
        taken = _DECLARED.get(chosen)
        if taken is not None and (taken.event is event or taken.event.event_type != event.event_type):
            raise ScheduleError(f"there is a schedule named {chosen!r} already: give each one a name=")
        missing = [field for field, about in event.model_fields.items() if about.is_required() and field != AT]
        if missing:
            raise ScheduleError(
                f"{event.__name__}.{missing[0]} has no default, and nobody is there to say what it is: give it one, or "
                "make the schedule at run time, with schedule()"
            )
        try:
            event.model_validate({AT: datetime.now(UTC)})
        except ValidationError:
            raise ScheduleError(f"{event.__name__}.{AT} must be a datetime") from None
        _DECLARED[chosen] = _Declared(event, timing, catch_up)
        return event

    return register


def declared() -> list[Definition]:
    """What the code declares, by name. Import all consumers first.

    Raises:
        ScheduleError: nobody consumes what one publishes.
    """
    return [
        _definition(name, each.event, {}, each.timing, each.catch_up, declared=True)
        for name, each in sorted(_DECLARED.items())
    ]


async def schedule(
    session: AsyncSession,
    name: str,
    event: Event,
    *,
    cron: str | None = None,
    every: timedelta | None = None,
    tz: str = "UTC",
    catch_up: str = "latest",
) -> datetime:
    """Publish this event whenever the time comes, from the session's commit on; or change the schedule of that name.

    One that is like this already stays as it is. A field `scheduled_at` of the event is set each time.

    Args:
        session: As for `publish`.
        name: What it is called here, in `unschedule` and by `outbox schedules`: up to 200 characters.
        event: What is published, each time anew.
        cron: As in `scheduled`.
        every: As in `scheduled`; counted from now.
        tz: As in `scheduled`.
        catch_up: As in `scheduled`.

    Returns:
        When it fires next.

    Raises:
        ScheduleError: it could never fire, or not as it says, or the code declares one of that name.
        PublishError: as for `publish`.
    """
    timing = Timing(cron, every, tz)
    _check_catch_up(catch_up)
    payload = checked_payload(event)
    payload.pop(AT, None)
    wanted = _definition(_checked_name(name), type(event), payload, timing, catch_up, declared=False)
    check_session(session)
    await (await session.connection()).run_sync(refuse_autocommit)
    next_at = await put(session, wanted)
    if next_at is not None:
        return next_at
    found = await scheduling.find(session, name)
    assert found is not None, "its row is locked"
    in_the_code, next_at = found
    if in_the_code:
        raise ScheduleError(f"the code declares a schedule named {name!r}: give this one another name")
    await confirm(session)  # the caller is about to be told that it is here
    return next_at


async def unschedule(session: AsyncSession, name: str) -> bool:
    """End a schedule that was made by `schedule`, with the session's commit; whether there was one."""
    check_session(session)
    await (await session.connection()).run_sync(refuse_autocommit)
    return await scheduling.remove(session, name)


async def put(session: AsyncSession, wanted: Definition) -> datetime | None:
    """Create or change a schedule, and write its next tick; when that is, or `None` if nothing was changed."""
    changed = await scheduling.put(session, wanted)
    if changed is None:
        return None
    timing = Timing(wanted.cron, wanted.every, wanted.tz)
    at = changed.next_at or timing.after(changed.now, changed.anchor)
    await scheduling.set_tick(session, wanted.name, wanted.queue, at, former=changed.tick_id, paused=changed.paused)
    return at


def _definition(
    name: str, event: type[Event], payload: dict[str, object], timing: Timing, catch_up: str, *, declared: bool
) -> Definition:
    queue = queue_of(event)
    if queue is None:
        raise ScheduleError(f"nobody consumes {event.event_type!r}, so there is nothing to schedule: add a @consumer")
    return Definition(
        name=name,
        declared=declared,
        event_type=event.event_type,
        version=event.event_version,
        payload=payload,
        cron=timing.cron,
        every=timing.every,
        tz=timing.tz,
        catch_up=catch_up,
        queue=queue,
    )


def queue_of(event: type[Event]) -> str | None:
    """Where the ticks of such an event wait: where it will itself, so that whoever takes from there runs both."""
    consumers = consumers_of(event)
    return consumers[0].queue if consumers else None


def _check_catch_up(catch_up: str) -> None:
    if catch_up not in CATCH_UP:
        raise ScheduleError(f"catch_up is one of {', '.join(CATCH_UP)}, not {catch_up!r}")


def _checked_name(name: str) -> str:
    if not name or len(name) > 200 or storable(name) != name:
        raise ScheduleError("a schedule's name has 1 to 200 characters, no NUL")
    return name
