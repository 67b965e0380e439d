"""What the test kit (`service/outbox/testing.py`) asks of the ledger, in place of a relay."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import Interval, bindparam, select, text

from service.ledger.ids import FAN_OUT
from service.ledger.scheduling import TICK
from service.ledger.tables import DeadLetter, OutboxMessage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

# Whichever consumer a test is about: what SQL has published reaches it in two steps.
_DUE = f"""
SELECT id, consumer FROM outbox_message
WHERE state = 'pending' AND due_at <= clock_timestamp() AND (:only = '' OR consumer IN (:only, '{FAN_OUT}'))
  AND (CAST(:event_id AS uuid) IS NULL OR event_id = :event_id)
  AND NOT id = ANY(CAST(:ran AS uuid[]))
ORDER BY due_at, id LIMIT 1
"""  # noqa: S608
# Ticks of schedules keep their time: only a test that travels meets them.
_MAKE_DUE = f"""
UPDATE outbox_message SET due_at = clock_timestamp()
WHERE state = 'pending' AND due_at > now() AND due_at < outbox_parked() AND consumer <> '{TICK}'
"""  # noqa: S608
_NEXT = """
SELECT id, consumer, due_at, due_at - clock_timestamp() AS due_in FROM outbox_message
WHERE state = 'pending' AND due_at <= clock_timestamp() + CAST(:ahead AS interval) ORDER BY due_at, id LIMIT 1
"""
_MAKE_ONE_DUE = "UPDATE outbox_message SET due_at = least(due_at, clock_timestamp()) WHERE id = :id"
# A tick's time is that of its schedule, and not counted from now.
_DEFER = f"""
UPDATE outbox_message SET due_at = due_at + CAST(:ahead AS interval)
WHERE state = 'pending' AND due_at < outbox_parked() AND consumer <> '{TICK}' AND (created_at > :since OR id = :id)
"""  # noqa: S608
_UNFINISHED = """
SELECT state, coalesce(concat_ws(': ', errors -> -1 ->> 'type', errors -> -1 ->> 'message'), '') AS why
FROM outbox_message WHERE id = :id AND state <> 'completed'
UNION ALL
SELECT 'dead', reason FROM dead_letter WHERE message_id = :id AND resolution IS NULL
"""


async def published_documents(where: AsyncSession | AsyncConnection, event_type: str) -> dict[UUID, tuple[int, str]]:
    """The version and the JSON of every event of this type that `where` can see."""
    found: dict[UUID, tuple[int, str]] = {}
    for table in (OutboxMessage, DeadLetter):
        query = select(table.event_id, table.version, table.payload).where(table.event_type == event_type)
        found |= {row.event_id: (row.version, json.dumps(row.payload)) for row in await where.execute(query)}
    return found


async def next_due(
    session: AsyncSession, ran: Sequence[UUID], *, only: str | None, event_id: UUID | None
) -> tuple[UUID, str] | None:
    """The delivery that has been due longest, apart from these, with its consumer."""
    wanted = {"only": only or "", "event_id": event_id, "ran": ran}
    row = (await session.execute(text(_DUE), wanted)).one_or_none()
    return None if row is None else (row.id, row.consumer)


async def make_due(session: AsyncSession) -> None:
    """Let delayed events and retries come due now."""
    await session.execute(text(_MAKE_DUE))


async def now(session: AsyncSession) -> datetime:
    """By PostgreSQL's clock."""
    moment: datetime = (await session.execute(text("SELECT clock_timestamp()"))).scalar_one()
    return moment


async def next_until(session: AsyncSession, ahead: timedelta) -> tuple[UUID, str, timedelta] | None:
    """What comes due first before so much time is over: the delivery, its consumer, and how far ahead that is."""
    statement = text(_NEXT).bindparams(bindparam("ahead", type_=Interval))
    row = (await session.execute(statement, {"ahead": ahead})).one_or_none()
    if row is None:
        return None
    await session.execute(text(_MAKE_ONE_DUE), {"id": row.id})
    return row.id, row.consumer, row.due_in


async def defer(session: AsyncSession, ahead: timedelta, since: datetime, delivery_id: UUID | None) -> None:
    """Let what was written since then, or put back of this delivery, be as much later as the test is ahead."""
    statement = text(_DEFER).bindparams(bindparam("ahead", type_=Interval))
    await session.execute(statement, {"ahead": ahead, "since": since, "id": delivery_id})


async def unfinished(session: AsyncSession, delivery_id: UUID) -> tuple[str, str] | None:
    """The state of a delivery that is not completed, or `dead`, and why."""
    row = (await session.execute(text(_UNFINISHED), {"id": delivery_id})).one_or_none()
    return None if row is None else (row.state, row.why)
