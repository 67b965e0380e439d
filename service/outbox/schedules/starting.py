"""When what the code declares takes effect: as soon as all workers that are alive declare the same.

While two versions of the code run side by side nothing changes. So a worker of the old one that is started once more
does not bring back what the new one changed or removed, and after a rollback the old schedules are there again. It
costs a worker one transaction when it starts, and one every 10 s while others have other code.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import astuple
from typing import TYPE_CHECKING

from service.database.sessions import session_factory, transaction
from service.ledger import scheduling
from service.ledger.presence import REPORT_EVERY
from service.outbox.events import event_named
from service.outbox.schedules import ticking  # noqa: F401  registers its consumer
from service.outbox.schedules.definitions import declared, put, queue_of
from service.telemetry.logs import brief, get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from service.database.driver import Connection
    from service.database.sessions import SessionFactory
    from service.ledger.presence import Presence
    from service.ledger.scheduling import Definition

_log = get_logger(__name__)


def start(engine: AsyncEngine, presence: Presence) -> asyncio.Task[None]:
    """Put in force what the code of this worker process declares; cancel the task when the process ends.

    Args:
        engine: Of the worker.
        presence: This process in the ledger.

    Raises:
        ScheduleError: nobody consumes what a schedule publishes.
    """
    wanted = declared()
    return asyncio.create_task(_until_in_force(session_factory(engine), presence, wanted))


async def _until_in_force(sessions: SessionFactory, presence: Presence, wanted: Sequence[Definition]) -> None:
    mine = hashlib.sha256(repr([astuple(each) for each in wanted]).encode()).hexdigest()[:16]
    marked, said = False, ""
    while True:
        try:
            # Seen by all who look from now on: of two that start at once, one sees the other.
            if not marked:
                async with transaction(sessions) as session:
                    await presence.tell(await _driver(session))
                    await scheduling.mark(session, presence.id, mine)
                marked = True
            async with transaction(sessions) as session:
                others = await scheduling.count_others(session, mine)
                if not others:
                    await put_in_force(session, wanted)
                    return
            reason = f"{others} worker processes declare other schedules"
        except Exception as error:  # noqa: BLE001  whatever it is, deliveries go on, and the next time may succeed
            reason = brief(error)
        if reason != said:
            _log.warning("schedules.wait", reason=reason)
        said = reason
        await asyncio.sleep(REPORT_EVERY)


async def put_in_force(session: AsyncSession, wanted: Sequence[Definition]) -> None:
    """Let exactly these be the declared schedules, and let each schedule have its tick where its event will wait."""
    await scheduling.one_at_a_time(session)
    changed = [each.name for each in wanted if await put(session, each) is not None]
    removed = await scheduling.remove_other_declared(session, [each.name for each in wanted])
    for event_type, queue in await scheduling.queues(session):
        kind = event_named(event_type)
        to = queue_of(kind) if kind else None
        if to is not None and to != queue:
            await scheduling.move(session, event_type, queue, to)
    restored = await scheduling.write_lost_ticks(session)
    if changed or removed or restored:
        _log.info("schedules.in_force", changed=changed, removed=removed, restored=restored)


async def _driver(session: AsyncSession) -> Connection:
    raw = await (await session.connection()).get_raw_connection()
    driver: Connection | None = raw.driver_connection
    assert driver is not None
    return driver
