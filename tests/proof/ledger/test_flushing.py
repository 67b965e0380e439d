"""A published event is a statement that waits for the flush, and all else sees it as if it were a mapped object.

Objects cost several times as much, and are what savepoints, queries, hooks and rollbacks were made for. So each program
here runs in both kinds of session and must come to the same, look by look.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from service.database.engine import create_engine
from service.database.sessions import FlushingSession, session_factory, transaction
from service.errors import PublishError
from service.ledger.tables import AcceptedEvent, OutboxMessage
from service.outbox import publish
from service.outbox.publish import READ_ONLY
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.orm import SessionTransaction

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


class Flushing(AsyncSession):
    """What `OneTransaction` is without an owner."""

    sync_session_class = FlushingSession


KINDS = (AsyncSession, Flushing)


class Undone(Exception):  # noqa: N818  nothing is wrong
    """Rolls a savepoint or a transaction back."""


def happened() -> domain.Happened:
    return domain.Happened(subject_id=uuid4())


async def look(session: AsyncSession) -> int:
    return int((await session.execute(select(func.count()).select_from(OutboxMessage))).scalar_one())


async def add(session: AsyncSession) -> None:
    session.add(AcceptedEvent(key=str(uuid4()), event_id=uuid4()))


async def fan_out(session: AsyncSession) -> None:
    publish(session, domain.FannedOut(subject_id=uuid4()))


async def publish_one(session: AsyncSession) -> None:
    publish(session, happened())


async def publish_later(session: AsyncSession) -> None:
    publish(session, happened(), delay=timedelta(minutes=1))


async def flush(session: AsyncSession) -> None:
    await session.flush()


async def execute(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


async def commit(session: AsyncSession) -> None:
    """Past the session's owner."""
    await session.run_sync(lambda sync: sync.commit())


async def roll_back(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.rollback())


NESTED: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([publish_one, publish_later, fan_out, add, flush, look, execute]),
    lambda steps: st.tuples(st.sampled_from(["keep", "undo"]), st.lists(steps, max_size=3)),
    max_leaves=6,
)
PROGRAM = st.lists(NESTED | st.sampled_from([commit, roll_back]), max_size=7)


async def run(session: AsyncSession, steps: list[Any]) -> list[Any]:
    """Do the steps, and what the session itself saw on the way."""
    seen: list[Any] = []
    for step in steps:
        if not isinstance(step, tuple):
            seen.append(await step(session))
            continue
        outcome, nested = step
        with suppress(Undone):
            async with session.begin_nested():
                seen += await run(session, nested)
                if outcome == "undo":
                    raise Undone
    return seen


async def ran(engine: AsyncEngine, kind: type[AsyncSession], steps: list[Any], *, whole: bool) -> list[Any]:
    """What the session saw, and then the events and other rows that exist."""
    async with engine.begin() as connection:
        await connection.execute(text("DELETE FROM outbox_message"))
        await connection.execute(text("DELETE FROM accepted_event"))
    seen: list[Any] = []
    with suppress(Undone):
        async with transaction(session_factory(engine, kind)) as session:
            seen += await run(session, steps)
            if not whole:
                raise Undone
    counted = "SELECT (SELECT count(*) FROM outbox_message), (SELECT count(*) FROM accepted_event)"
    async with engine.connect() as connection:
        return [*seen, *(await connection.execute(text(counted))).one()]


@pytest.mark.slow
def test_a_session_with_a_published_event_is_as_one_with_an_object(settings: Settings) -> None:
    with asyncio.Runner() as runner:
        engine = create_engine(settings.database, application_name="tests")

        @examples(
            max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(PROGRAM, st.booleans())
        @example([publish_one, roll_back, execute], True)
        @example([publish_one, ("undo", [publish_one]), look], True)
        @example([fan_out, ("keep", [publish_one, ("undo", [])]), publish_one, commit, publish_one], True)
        def same(steps: list[Any], whole: bool) -> None:
            objects, statements = (runner.run(ran(engine, kind, steps, whole=whole)) for kind in KINDS)
            assert statements == objects

        try:
            same()
        finally:
            runner.run(engine.dispose())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["before_flush", "after_flush", "before_commit"])
@pytest.mark.parametrize("published", [True, False])
async def test_an_event_that_a_hook_publishes_is_committed(
    ledger: Ledger, engine: AsyncEngine, kind: type[AsyncSession], hook: str, published: bool
) -> None:
    async with transaction(session_factory(engine, kind)) as session:

        def hooked(*_: Any) -> None:
            publish(session, happened())

        event.listen(session.sync_session, hook, hooked, once=True)
        session.add(AcceptedEvent(key=str(uuid4()), event_id=uuid4()))
        if published:
            publish(session, happened())
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 1 + published


async def test_an_event_published_at_a_savepoints_end_by_the_whole_commit_is_committed(
    ledger: Ledger, engine: AsyncEngine
) -> None:
    """The commit ends the open savepoint, and SQLAlchemy looks once more for objects only."""
    async with session_factory(engine, Flushing)() as session:

        def hooked(_: Any, ended: SessionTransaction) -> None:
            if ended.nested:
                publish(session, happened())

        root = await session.begin()
        session.add(AcceptedEvent(key="business", event_id=uuid4()))
        await session.begin_nested()
        event.listen(session.sync_session, "after_transaction_end", hooked)
        await root.commit()
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 1


async def test_a_block_of_begin_commits_what_was_published_in_it(ledger: Ledger, engine: AsyncEngine) -> None:
    """It commits by the session's transaction, past its owner."""
    async with transaction(session_factory(engine, Flushing)) as session, session.begin():
        publish(session, happened())
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 1


async def test_no_commit_succeeds_without_an_event_that_could_not_be_written(
    ledger: Ledger, engine: AsyncEngine
) -> None:
    """Whoever swallows the error: PostgreSQL would answer the COMMIT with a ROLLBACK, and no error."""
    async with session_factory(engine, Flushing)() as session:
        session.add(AcceptedEvent(key="business", event_id=uuid4()))
        await session.flush()
        with suppress(DBAPIError):
            await session.execute(text("SELECT 1/0"))
        publish(session, happened())
        for _ in range(2):
            with pytest.raises(DBAPIError):
                await session.run_sync(lambda sync: sync.commit())
    assert await ledger.connection.fetchval("SELECT count(*) FROM accepted_event") == 0


async def test_autocommit_is_refused_before_anything_is_written(ledger: Ledger, engine: AsyncEngine) -> None:
    sessions = session_factory(engine.execution_options(isolation_level="AUTOCOMMIT"), Flushing)
    with pytest.raises(PublishError, match="AUTOCOMMIT"):
        async with transaction(sessions) as session:
            publish(session, happened())
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 0


async def test_a_session_that_is_never_committed_is_refused(engine: AsyncEngine) -> None:
    async with session_factory(engine, Flushing)(info={READ_ONLY: True}) as session:
        with pytest.raises(PublishError, match="never committed"):
            publish(session, happened())


async def test_it_is_a_statement_that_waits(engine: AsyncEngine) -> None:
    """Or all of the above would compare objects with objects."""
    async with session_factory(engine, Flushing)() as session:
        for _ in range(2):
            publish(session, happened())
            assert not session.new
            assert isinstance(session.sync_session, FlushingSession)
            assert session.sync_session._statements
            await session.run_sync(lambda sync: sync.commit())
            assert not session.sync_session._statements
