"""What happens when the time comes: the consumer that every worker has, for the ticks of all schedules."""

from __future__ import annotations

import json
from datetime import datetime
from typing import TYPE_CHECKING

from service.ledger import scheduling
from service.ledger.scheduling import TICK, Locked
from service.outbox.consumers import ANY_QUEUE, Postpone, consumer, consumers_of
from service.outbox.events import Event, event_named
from service.outbox.publish import publish
from service.outbox.schedules.definitions import AT
from service.outbox.schedules.timing import Timing, fire

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from service.outbox.delivery import Delivery


class Tick(Event, type=TICK):
    """A schedule's time has come. With `by` a person wants it now, with `skip` a person let it pass."""

    schedule: str
    at: datetime
    skip: bool = False
    by: str | None = None
    why: str | None = None


@consumer(Tick, queue=ANY_QUEUE, name=TICK, max_retries=1000, max_backoff=60_000)
async def tick(event: Tick, delivery: Delivery) -> None:
    """Publish what is due, and write the next tick."""
    async with delivery.begin() as session:
        schedule = await scheduling.lock(session, event.schedule)
        if schedule is None:
            return  # it was removed
        if event.by is not None:
            _publish(session, schedule, event.at)
            return
        if schedule.paused or str(schedule.tick_id) != delivery.idempotency_key:
            return  # paused, or changed since this was written
        timing = Timing(schedule.cron, schedule.every, schedule.tz)
        now = fire(timing, schedule.catch_up, schedule.next_at, schedule.now, schedule.anchor, skip=event.skip)
        for at in now.ticks:
            _publish(session, schedule, at)
        last_at = now.ticks[-1] if now.ticks else None
        await scheduling.set_tick(session, schedule.name, schedule.queue, now.following, former=None, last_at=last_at)


def _publish(session: AsyncSession, schedule: Locked, at: datetime) -> None:
    kind = event_named(schedule.event_type)
    if kind is None or schedule.version > kind.event_version or not consumers_of(kind):
        raise Postpone(f"no consumer of {schedule.event_type} version {schedule.version} is deployed")
    values = dict(schedule.payload)
    if AT in kind.model_fields:
        values[AT] = at.isoformat()
    publish(session, kind.model_validate_json(json.dumps(values)))
