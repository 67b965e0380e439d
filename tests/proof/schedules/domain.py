"""What the schedules' tests publish again and again."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import text

from service.outbox import Delivery, Event, consumer

SCHEMA = """
CREATE TABLE IF NOT EXISTS beat (who text NOT NULL, at timestamptz, seen timestamptz DEFAULT clock_timestamp())
"""


class Beat(Event, type="schedules.beat"):
    who: str = ""
    scheduled_at: datetime | None = None


class Unheard(Event, type="schedules.unheard", unconsumed=True):
    who: str = ""


@consumer(Beat, queue="beats", name="schedules.note")
async def note(event: Beat, delivery: Delivery) -> None:
    """One row for each; no constraint, so that what happens twice shows as two."""
    async with delivery.begin() as session:
        await session.execute(
            text("INSERT INTO beat (who, at) VALUES (:who, :at)"), {"who": event.who, "at": event.scheduled_at}
        )
