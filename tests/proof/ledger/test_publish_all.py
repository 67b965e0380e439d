"""Publishing many events at once is publishing each of them, in fewer statements."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import event as sqlalchemy_event

from service.database.engine import create_engine
from service.database.sessions import OneTransaction, session_factory, transaction
from service.errors import PublishError
from service.ledger.publishing import ROWS
from service.outbox import Event, publish, publish_all
from service.telemetry.logs import trace_context
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.sessions import SessionFactory
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger


@pytest.fixture
async def engine(settings: Settings) -> AsyncIterator[AsyncEngine]:
    engine = create_engine(settings.database, application_name="tests")
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> SessionFactory:
    """As a request has them."""
    return session_factory(engine, OneTransaction)


def happened(how: str = "") -> domain.Happened:
    return domain.Happened(subject_id=uuid4(), how=how)


@contextmanager
def inserts(engine: AsyncEngine) -> Iterator[list[int]]:
    """How many rows each statement writes that is executed meanwhile."""
    found: list[int] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        if "INSERT INTO outbox_message" in statement:
            found.append(len(parameters) if many else len(parameters[0]))

    sqlalchemy_event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield found
    sqlalchemy_event.remove(engine.sync_engine, "before_cursor_execute", note)


async def count(ledger: Ledger) -> int:
    return int(await ledger.connection.fetchval("SELECT count(*) FROM outbox_message"))


async def test_each_row_is_as_publish_would_have_written_it(ledger: Ledger, sessions: SessionFactory) -> None:
    events = [happened("ä\\\"'"), domain.FannedOut(subject_id=uuid4()), domain.Ignored(subject_id=uuid4())]
    with trace_context({"correlation_id": "request-1"}):
        async with transaction(sessions) as session:
            alone = [publish(session, event, delay=timedelta(minutes=5)) for event in events]
        async with transaction(sessions) as session:
            together = publish_all(session, events, delay=timedelta(minutes=5))
    assert len(set(alone + together)) == 6
    rows = [
        await ledger.connection.fetch(
            """SELECT row_number() OVER (ORDER BY id), event_type, version, consumer, queue, payload, headers, state,
                      attempts, dispatches, errors, claim_token, due_at - created_at > interval '299 s' AS delayed,
                      array_position($1::uuid[], event_id) AS event, substring(id::text, 35) AS number
               FROM outbox_message WHERE event_id = ANY($1) ORDER BY id""",
            ids,
        )
        for ids in (alone, together)
    ]
    assert rows[0] == rows[1]
    assert json.loads(rows[1][0]["payload"])["how"] == "ä\\\"'"
    assert rows[1][0]["delayed"]


async def test_they_are_there_with_their_transaction_or_not_at_all(ledger: Ledger, sessions: SessionFactory) -> None:
    with pytest.raises(RuntimeError):
        async with transaction(sessions) as session:
            publish_all(session, [happened(), happened()])
            await session.flush()
            raise RuntimeError
    assert await count(ledger) == 0


async def test_one_that_cannot_be_published_keeps_all_of_them_out(ledger: Ledger, sessions: SessionFactory) -> None:
    def events() -> Iterator[Event]:
        yield happened()
        yield happened("\x00")

    async with transaction(sessions) as session:
        with pytest.raises(PublishError, match="NUL"):
            publish_all(session, events())
    assert await count(ledger) == 0


async def test_statements_are_few_and_bounded(ledger: Ledger, sessions: SessionFactory, engine: AsyncEngine) -> None:
    with inserts(engine) as written:
        async with transaction(sessions) as session:
            publish_all(session, [happened() for _ in range(2 * ROWS + 1)])
    assert written == [ROWS, ROWS, 1]
    assert await count(ledger) == 2 * ROWS + 1


async def test_none_at_all_is_no_error(ledger: Ledger, sessions: SessionFactory) -> None:
    async with transaction(sessions) as session:
        assert publish_all(session, []) == []
    assert await count(ledger) == 0


async def test_a_session_that_writes_objects_only_takes_them_too(ledger: Ledger) -> None:
    async with transaction(ledger.sessions) as session:
        publish_all(session, [happened() for _ in range(3)], delay=timedelta(minutes=5))
    assert await count(ledger) == 3
    assert await ledger.connection.fetchval("SELECT min(due_at) > now() FROM outbox_message")


async def test_a_sleeping_relay_is_woken_once(ledger: Ledger, sessions: SessionFactory, connect: Connect) -> None:
    relay = await connect()
    heard: asyncio.Queue[str] = asyncio.Queue()
    await relay.add_listener("outbox", lambda *_: heard.put_nowait("outbox"))
    await relay.add_listener("after", lambda *_: heard.put_nowait("after"))
    await relay.execute("SELECT pg_advisory_lock(outbox_gate())")
    async with transaction(sessions) as session:
        publish_all(session, [happened() for _ in range(ROWS + 1)])
    await ledger.connection.execute("NOTIFY after")
    assert [await heard.get(), await heard.get()] == ["outbox", "after"]
