"""An event that follows another one is published once, when all consumers of that one are done."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Literal
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.database.driver import read_json
from service.database.sessions import OneTransaction, session_factory, transaction
from service.errors import PublishError
from service.ledger.editing import Edited, replace
from service.ledger.ids import FAN_OUT
from service.ledger.purging import purge_step_by_step
from service.ledger.replaying import _DISCARD, resolve
from service.outbox import cancel, publish
from tests.proof.ledger.domain import Abandoned, FannedOut, Happened, Ignored, Lonely
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from service.outbox import Event
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Connect, Ledger

_WAITING = f"""
SELECT count(*) FROM outbox_message WHERE consumer = '{FAN_OUT}' AND state = 'pending' AND due_at = outbox_parked()
"""
_DUE = f"""
SELECT id FROM outbox_message WHERE consumer = '{FAN_OUT}' AND state <> 'completed' AND due_at <= clock_timestamp()
"""
_DONE = "UPDATE outbox_message SET state = 'completed', completed_at = clock_timestamp() WHERE id = $1"


def both() -> FannedOut:
    """It has two consumers."""
    return FannedOut(subject_id=uuid4())


def then() -> Happened:
    return Happened(subject_id=uuid4())


async def published(ledger: Ledger, event: Event | None = None, **options: timedelta) -> list[UUID]:
    """The ids of the deliveries that have to be done first."""
    return await ledger.publish(event or both(), then=then(), **options)


async def is_waiting(ledger: Ledger) -> bool:
    return bool(await ledger.connection.fetchval(_WAITING) == 1)


async def is_due(ledger: Ledger) -> bool:
    """Whether it is there, once."""
    return not await is_waiting(ledger) and len(await ledger.connection.fetch(_DUE)) == 1


@pytest.mark.parametrize("kind", [None, OneTransaction], ids=["plain", "lent"])
async def test_it_is_published_when_the_last_consumer_is_done(
    ledger: Ledger, runner: Runner, engine: AsyncEngine, kind: type[AsyncSession] | None
) -> None:
    async with transaction(session_factory(engine, *filter(None, [kind]))) as session:
        event_id = publish(session, both(), then=(follow_up := then()), delay=timedelta(milliseconds=1))
    assert await is_waiting(ledger)
    rows = await ledger.connection.fetch("SELECT * FROM outbox_message WHERE event_id = $1 ORDER BY id", event_id)
    for number, each in enumerate(rows, start=1):
        await ledger.expire(each["id"])
        await runner.deliver(each["id"])
        assert await is_waiting(ledger) is (number == 1)
    fan_out: UUID = await ledger.connection.fetchval(_DUE)
    await runner.deliver(fan_out)
    row = await ledger.connection.fetchrow("SELECT * FROM outbox_message WHERE consumer = 'ledger.react'")
    assert row is not None
    assert str(follow_up.subject_id) in row["payload"]
    await read_json(ledger.connection)
    headers = await ledger.connection.fetchval("SELECT headers FROM outbox_message WHERE id = $1", row["id"])
    first = await ledger.connection.fetchval("SELECT headers FROM outbox_message WHERE id = $1", rows[0]["id"])
    assert first["then"] == str(row["event_id"])
    assert headers == {"causation_id": str(fan_out), "correlation_id": first["correlation_id"]}
    await runner.deliver(row["id"])
    assert await ledger.effects(row["id"]) == 1


async def test_of_two_that_are_the_last_one_waits_for_the_other(ledger: Ledger, connect: Connect) -> None:
    """At the same moment, and neither sees what the other has not committed."""
    ids = await published(ledger)
    ends = []
    for each in ids:
        end = (connection := await connect()).transaction()
        await end.start()
        await connection.execute(_DONE, each)
        ends.append((connection, end))
    [(first, commit_first), (_, commit_second)] = ends
    await first.execute("SET CONSTRAINTS ALL IMMEDIATE")
    second = asyncio.create_task(commit_second.commit())
    await until(lambda: blocked(ledger))
    await commit_first.commit()
    await second
    assert await is_due(ledger)


async def test_however_they_race_it_comes_once(ledger: Ledger, runner: Runner) -> None:
    ids = [each for _ in range(20) for each in await published(ledger)]
    await asyncio.gather(*(runner.deliver(each) for each in ids))
    due = [row["id"] for row in await ledger.connection.fetch(_DUE)]
    assert len(set(due)) == 20
    assert await ledger.connection.fetchval(_WAITING) == 0
    await asyncio.gather(*(runner.deliver(each) for each in due))
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE consumer = 'ledger.react'") == 20


async def test_those_who_end_several_take_turns(ledger: Ledger, connect: Connect) -> None:
    """Two persons discard dead letters of the same events, in another order."""
    one, two = [await buried(ledger, each) for each in await published(ledger)]
    three, four = [await buried(ledger, each) for each in await published(ledger)]
    other = await connect()
    async with ledger.connection.transaction():
        await ledger.connection.fetch(_DISCARD, [one, three], "ann", None)
        second = asyncio.create_task(other.fetch(_DISCARD, [four, two], "bob", None))
        await until(lambda: blocked(ledger))
    await second
    assert len(await ledger.connection.fetch(_DUE)) == 2


async def buried(ledger: Ledger, message_id: UUID) -> int:
    """The dead letter of a delivery that is open."""
    number: int = await ledger.connection.fetchval(
        """WITH dead AS (DELETE FROM outbox_message WHERE id = $1 RETURNING *)
           INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers,
                                    attempts, dispatches, created_at, errors, reason)
           SELECT id, event_id, event_type, version, consumer, queue, payload, headers, 1, 1, created_at, '[]', 'died'
           FROM dead RETURNING id""",
        message_id,
    )
    return number


@pytest.mark.parametrize("way", ["discard", "replay", "edit"])
async def test_a_dead_letter_holds_it_back_until_a_person_decides(
    ledger: Ledger, runner: Runner, way: Literal["discard", "replay", "edit"]
) -> None:
    (message_id,) = await published(ledger, Happened(subject_id=uuid4(), how="die"))
    await runner.deliver(message_id)
    letter = await ledger.dead_letter(message_id)
    assert letter is not None
    assert await is_waiting(ledger)
    if way == "edit":
        await read_json(ledger.connection)
        done = await replace(ledger.connection, letter["id"], {}, 1, fields=["how"], by="a test", why=None)
        assert isinstance(done, Edited)
        message_id = done.delivery_id
    else:
        await resolve(ledger.connection, way, [letter["id"]], by="a test", why=None)
    if way != "discard":
        assert await is_waiting(ledger)
        await ledger.connection.execute(_DONE, message_id)
    assert await is_due(ledger)


async def test_what_is_told_of_a_death_does_not_stand_for_the_dead(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await published(ledger, Abandoned(subject_id=uuid4()))
    await runner.deliver(message_id)
    told = await ledger.connection.fetchval("SELECT id FROM outbox_message WHERE consumer = 'ledger.abandon.on_dead'")
    await runner.deliver(told)
    assert await ledger.effects(told) == 1
    assert await is_waiting(ledger)


async def test_what_has_expired_is_done(ledger: Ledger, runner: Runner) -> None:
    ids = await published(ledger, expires=timedelta(microseconds=1))
    for each in ids:
        await runner.deliver(each)
    assert await ledger.connection.fetchval("SELECT count(*) FROM effect") == 0
    assert await is_due(ledger)


async def test_cancelling_takes_it_back(ledger: Ledger, runner: Runner) -> None:
    """Also where it comes too late for one of the consumers."""
    for late in (0, 1, 2):
        ids = await published(ledger)
        for each in ids[:late]:
            await runner.deliver(each)
        async with transaction(ledger.sessions) as session:
            assert await cancel(session, UUID(int=ids[0].int - 1)) is (late == 0)
        assert not await is_waiting(ledger)
        assert await is_due(ledger) is (late == 2)


async def test_what_was_purged_or_deleted_is_not_waited_for(ledger: Ledger) -> None:
    one, other = await published(ledger)
    await ledger.connection.execute(_DONE, one)
    purged = await purge_step_by_step(ledger.connection, timedelta(hours=-1))
    assert purged is not None
    assert purged.deliveries == 1
    assert await is_waiting(ledger)
    await ledger.connection.execute("DELETE FROM outbox_message WHERE id = $1", other)
    assert await is_due(ledger)


async def test_it_goes_with_its_transaction(ledger: Ledger) -> None:
    ids = await published(ledger)
    undone = ledger.connection.transaction()
    await undone.start()
    for each in ids:
        await ledger.connection.execute(_DONE, each)
    await ledger.connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert await is_due(ledger)
    await undone.rollback()
    assert await is_waiting(ledger)


async def test_above_read_committed_nobody_ends_what_it_waits_for(ledger: Ledger) -> None:
    one, _ = await published(ledger)
    with pytest.raises(asyncpg.RaiseError, match="needs a transaction at READ COMMITTED, not REPEATABLE READ"):
        async with ledger.connection.transaction(isolation="repeatable_read"):
            await ledger.connection.execute(_DONE, one)
    assert await is_waiting(ledger)


async def test_where_nobody_is_waited_for_it_is_published_at_once(ledger: Ledger) -> None:
    await ledger.publish(Ignored(subject_id=uuid4()), then=then())
    found = await ledger.connection.fetch("SELECT consumer FROM outbox_message WHERE due_at <= clock_timestamp()")
    assert [row["consumer"] for row in found] == ["ledger.react"]


async def test_where_nobody_consumes_it_nothing_waits(ledger: Ledger) -> None:
    ids = await ledger.publish(both(), then=Ignored(subject_id=uuid4()))
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == len(ids) == 2


async def test_what_cannot_be_published_or_kept_is_refused_with_its_event(ledger: Ledger) -> None:
    async with transaction(ledger.sessions) as session:
        with pytest.raises(PublishError, match="nobody consumes"):
            publish(session, both(), then=Lonely(subject_id=uuid4()))
        with pytest.raises(PublishError, match="publish it without `then`"):
            publish(session, both(), then=then(), unique=True)
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message") == 0
