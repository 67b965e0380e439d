"""Schedules under attack: an event each second of each of several schedules, which leaves one row.

What is expected follows from what was asked for alone: the time of the first tick, one for each second after it, and
the time that the schedule would have fired next when it was ended. Nothing of the ledger is believed but that.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from service.database.sessions import session_factory, transaction
from service.outbox import Delivery, Event, consumer, schedule, unschedule
from tests.servers.real_servers import TEMPLATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.database.sessions import SessionFactory
    from tests.proof.chaos.world import World

__all__ = ["Beat", "Beats"]

EVERY = timedelta(seconds=1)

_SCHEMA = """
CREATE TABLE beat (name text NOT NULL, at timestamptz NOT NULL, seen timestamptz NOT NULL DEFAULT clock_timestamp())
"""


class Beat(Event, type="chaos.beat"):
    """Its schedule's time has come."""

    name: str
    change: int = 0
    scheduled_at: datetime | None = None


@consumer(Beat, queue="mail", name="chaos.note_beat")
async def note_beat(event: Beat, delivery: Delivery) -> None:
    """One row; no constraint hides a second one."""
    async with delivery.begin() as session:
        await session.execute(
            text("INSERT INTO beat VALUES (:name, :at)"), {"name": event.name, "at": event.scheduled_at}
        )


class Beats:
    """Schedules of a world, and what became of each of their ticks."""

    def __init__(self, world: World, names: Sequence[str]) -> None:
        self._world = world
        self._names = names
        self._first: dict[str, datetime] = {}
        self._end: dict[str, datetime] = {}
        url = world.postgres.socket_url(TEMPLATE).replace("postgresql://", "postgresql+asyncpg://", 1)
        self._engine = create_async_engine(url)
        self._sessions: SessionFactory = session_factory(self._engine)

    async def begin(self) -> None:
        """Make the schedules; each tick counts."""
        await self._world.sql(_SCHEMA)
        self._world.also_judge(self.judge)
        for name in self._names:
            async with transaction(self._sessions) as session:
                self._first[name] = await schedule(session, name, Beat(name=name), every=EVERY, catch_up="all")

    async def change(self, number: int) -> None:
        """Change something of all of them, but not when they fire."""
        for name in self._names:
            async with transaction(self._sessions) as session:
                await schedule(session, name, Beat(name=name, change=number), every=EVERY, catch_up="all")

    async def end(self) -> None:
        """End them; what was due until then is still to happen."""
        for name in self._names:
            async with transaction(self._sessions) as session:
                query = text("SELECT next_at FROM outbox_schedule WHERE name = :name FOR UPDATE")
                self._end[name] = (await session.execute(query, {"name": name})).scalar_one()
                assert await unschedule(session, name)
        await self._engine.dispose()

    async def judge(self) -> tuple[list[str], list[str]]:
        """What was missed, and what happened more than once or at no tick."""
        early = await self._world.sql("SELECT name, at FROM beat WHERE seen < at ORDER BY name, at")
        missed, wrong = [], [f"{row['name']}: a beat of {row['at']:%H:%M:%S} before its time" for row in early]
        rows = await self._world.sql("SELECT name, at, count(*) AS count FROM beat GROUP BY name, at ORDER BY name, at")
        seen = {(row["name"], row["at"].astimezone(UTC)): row["count"] for row in rows}
        for name, end in self._end.items():
            at = self._first[name].astimezone(UTC)
            while at < end:
                if not (count := seen.pop((name, at), 0)):
                    missed.append(f"{name}: no beat of {at:%H:%M:%S}")
                if count > 1:
                    wrong.append(f"{name}: {count} beats of {at:%H:%M:%S}")
                at += EVERY
        return missed, wrong + [f"{name}: a beat of {at:%H:%M:%S.%f}, which is no tick" for name, at in seen]
