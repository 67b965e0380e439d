"""Deliveries that end without their effect: cancelled before they begin, or claimed too late."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest

from service.database.driver import read_json
from service.database.sessions import transaction
from service.errors import PublishError
from service.ledger import history
from service.ledger.ids import event_of, new_id
from service.outbox import cancel, publish, publish_all
from tests.proof.ledger import domain
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger


async def cancelled(ledger: Ledger, message_id: UUID) -> bool:
    async with transaction(ledger.sessions) as session:
        return await cancel(session, event_of(message_id))


async def ended_as(ledger: Ledger, message_id: UUID) -> tuple[str, str | None]:
    row = await ledger.row(message_id)
    assert row is not None
    return row["state"], row["ended_as"]


@pytest.mark.parametrize("state", ["pending", "dispatched"])
async def test_what_has_not_begun_is_cancelled_and_never_runs(ledger: Ledger, runner: Runner, state: str) -> None:
    message_id = await ledger.happen()
    await ledger.set(message_id, state=state)
    assert await cancelled(ledger, message_id)
    await runner.deliver(message_id)
    assert await ended_as(ledger, message_id) == ("completed", "cancelled")
    assert await ledger.effects(message_id) == 0
    assert await cancelled(ledger, message_id)  # once more changes nothing


async def test_a_retry_is_cancelled(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("retry")
    await runner.deliver(message_id)
    assert await cancelled(ledger, message_id)
    assert await ended_as(ledger, message_id) == ("completed", "cancelled")


async def test_one_that_runs_goes_on(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(domain.Gated(subject_id=uuid4()))
    gate = domain.Gate()
    domain.GATES[str(message_id)] = [gate]
    run = asyncio.create_task(runner.deliver(message_id))
    await gate.reached.wait()
    assert not await cancelled(ledger, message_id)
    gate.opened.set()
    await run
    assert await ended_as(ledger, message_id) == ("completed", None)
    assert await ledger.effects(message_id) == 1
    assert not await cancelled(ledger, message_id)


async def test_what_has_begun_stays_and_the_others_are_cancelled(ledger: Ledger, runner: Runner) -> None:
    first, second = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    await runner.deliver(first)
    assert not await cancelled(ledger, first)
    assert await ended_as(ledger, first) == ("completed", None)
    assert await ended_as(ledger, second) == ("completed", "cancelled")


async def test_a_dead_letter_is_for_a_person_to_decide(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("die")
    await runner.deliver(message_id)
    assert not await cancelled(ledger, message_id)
    assert await ledger.state(message_id) == "dead"


async def test_there_is_nothing_to_cancel_of_an_event_that_is_not_there(ledger: Ledger) -> None:
    assert not await cancelled(ledger, new_id())


async def test_it_is_cancelled_with_its_transaction_or_not_at_all(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    with pytest.raises(RuntimeError):
        async with transaction(ledger.sessions) as session:
            assert await cancel(session, event_of(message_id))
            raise RuntimeError
    await runner.deliver(message_id)
    assert await ledger.effects(message_id) == 1


async def test_what_the_same_transaction_has_published_is_cancelled(ledger: Ledger) -> None:
    async with transaction(ledger.sessions) as session:
        event_id = publish(session, domain.Happened(subject_id=uuid4()))
        assert await cancel(session, event_id)


async def test_a_claim_waits_for_the_canceller_and_finds_nothing(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    async with transaction(ledger.sessions) as session:
        assert await cancel(session, event_of(message_id))
        run = asyncio.create_task(runner.deliver(message_id))
        await until(lambda: blocked(ledger))
    await run
    assert await ledger.effects(message_id) == 0


async def test_a_canceller_waits_for_a_claim_and_finds_it_running(ledger: Ledger) -> None:
    message_id = await ledger.happen()
    async with transaction(ledger.sessions) as worker:
        connection = await worker.connection()
        await connection.exec_driver_sql(
            f"UPDATE outbox_message SET state = 'running', claim_token = gen_random_uuid() WHERE id = '{message_id}'"
        )
        cancelling = asyncio.create_task(cancelled(ledger, message_id))
        await until(lambda: blocked(ledger))
    assert not await cancelling
    assert await ended_as(ledger, message_id) == ("running", None)


async def test_what_is_claimed_too_late_is_not_run(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(expires=timedelta(minutes=5))
    row = await ledger.row(message_id)
    assert row is not None
    assert timedelta(minutes=4, seconds=59) < row["expires_at"] - row["created_at"] < timedelta(minutes=5, seconds=1)
    await ledger.set(message_id, expires_at=row["created_at"])
    await runner.deliver(message_id)
    assert await ended_as(ledger, message_id) == ("completed", "expired")
    assert await ledger.effects(message_id) == 0
    assert runner._recorder._counted.keys() == {("ledger", "ledger.react", "expired")}
    (step,) = [step.kind for step in await steps(ledger, message_id) if step.kind not in ("published", "handed_over")]
    assert step == "expired"


async def test_what_is_claimed_in_time_is_run(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(expires=timedelta(minutes=5))
    await runner.deliver(message_id)
    assert await ended_as(ledger, message_id) == ("completed", None)
    assert await ledger.effects(message_id) == 1


async def test_a_retry_expires_too_and_says_what_had_failed(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="fail"), expires=timedelta(minutes=5))
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    await ledger.set(message_id, expires_at=row["created_at"])
    await ledger.expire(message_id)
    await runner.deliver(message_id)
    assert await ended_as(ledger, message_id) == ("completed", "expired")
    assert [step.kind for step in await steps(ledger, message_id)] == ["published", "failed", "expired"]


async def steps(ledger: Ledger, message_id: UUID) -> list[history.Step]:
    await read_json(ledger.connection)
    story = await history.tell(ledger.connection, message_id, timedelta(days=7))
    assert story is not None
    return story.deliveries[0].steps


async def test_many_expire_like_one(ledger: Ledger) -> None:
    async with transaction(ledger.sessions) as session:
        publish_all(session, [domain.Happened(subject_id=uuid4())], expires=timedelta(minutes=5))
    assert await ledger.connection.fetchval("SELECT expires_at - created_at > interval '299 s' FROM outbox_message")


@pytest.mark.parametrize("expires", [timedelta(), timedelta(minutes=1), timedelta(days=400)])
async def test_an_impossible_expiry_is_refused(ledger: Ledger, expires: timedelta) -> None:
    with pytest.raises(PublishError, match="expires must be"):
        await ledger.publish(delay=timedelta(minutes=1), expires=expires)
