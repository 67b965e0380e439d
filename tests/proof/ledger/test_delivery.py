"""What a consumer does with its delivery, and what becomes of the row."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.database.engine import create_engine
from service.outbox.running.runner import Runner
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, blocked
from tests.waiting import until

if TYPE_CHECKING:
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger


async def test_effect_and_completion_commit_together(ledger: Ledger, runner: Runner, raw: bool) -> None:
    message_id = await ledger.happen(raw=raw)
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"
    assert await ledger.effects(message_id) == 1


async def test_a_second_copy_has_no_effect(ledger: Ledger, runner: Runner, raw: bool) -> None:
    message_id = await ledger.happen(raw=raw)
    await runner.deliver(message_id)
    await runner.deliver(message_id)
    assert await ledger.effects(message_id) == 1


async def test_each_consumer_has_its_own_delivery(ledger: Ledger, runner: Runner) -> None:
    first, second = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    await runner.deliver(first)
    assert await ledger.state(first) == "completed"
    assert await ledger.state(second) == "pending"


async def test_without_begin_it_is_completed_on_return(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("outside")
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "completed"


async def test_a_failure_comes_due_again_with_backoff(ledger: Ledger, runner: Runner, settings: Settings) -> None:
    settings.outbox.min_backoff = settings.outbox.max_backoff = 10_000
    message_id = await ledger.happen("fail")
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 1)
    assert 4 < row["due_in"] <= 10


async def test_a_stale_copy_does_not_jump_the_backoff(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("retry")
    await runner.deliver(message_id)
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert row["attempts"] == 1
    assert 50 < row["due_in"] <= 60


async def test_out_of_attempts_means_dead_letter_with_its_history(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("fail")
    for _ in range(3):
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert await ledger.row(message_id) is None
    assert dead["reason"] == "failed 3 times"
    assert [error["attempt"] for error in json.loads(dead["errors"])] == [1, 2, 3]


async def test_errors_hold_no_payload_values(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("fail")
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    (error,) = json.loads(row["errors"])
    assert error["type"] == "RuntimeError"
    assert error["message"] == "cannot handle [payload]"
    assert "domain.py" in error["traceback"]
    assert json.loads(row["payload"])["subject_id"] not in row["errors"]


async def test_fail_dies_at_once(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("die")
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert dead["reason"] == "not worth another try"


@pytest.mark.parametrize("how", ["commit", "rollback"])
async def test_a_session_method_cannot_end_the_transaction_early(ledger: Ledger, runner: Runner, how: str) -> None:
    message_id = await ledger.happen(how)
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "dead"
    assert await ledger.effects(message_id) == 0


@pytest.mark.parametrize("how", ["sql_commit", "sql_rollback"])
async def test_sql_cannot_end_the_transaction_early(ledger: Ledger, runner: Runner, how: str, raw: bool) -> None:
    message_id = await ledger.happen(how, raw=raw)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert "SQL may not end the transaction" in dead["reason"]
    assert await ledger.effects(message_id) == 0


@pytest.mark.parametrize("how", ["driver_commit", "driver_rollback", "another_transaction", "transaction_rollback"])
async def test_no_completion_goes_with_half_an_effect(ledger: Ledger, runner: Runner, how: str, raw: bool) -> None:
    message_id = await ledger.happen(how, raw=raw)
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert "committed or rolled back inside its block" in dead["reason"]
    assert await ledger.effects(message_id) == (how == "driver_commit")


@pytest.mark.parametrize(("level", "says"), [("AUTOCOMMIT", "AUTOCOMMIT"), ("REPEATABLE READ", "READ COMMITTED")])
async def test_other_isolation_levels_are_refused(ledger: Ledger, settings: Settings, level: str, says: str) -> None:
    engine = create_engine(settings.database, application_name="other").execution_options(isolation_level=level)
    runner = Runner(settings, engine)
    await runner.open()
    try:
        message_id = await ledger.happen()
        await runner.deliver(message_id)
    finally:
        await runner.close()
        await engine.dispose()
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert says in dead["reason"]
    assert await ledger.effects(message_id) == 0


async def test_publishing_where_nothing_is_committed_is_refused(ledger: Ledger, runner: Runner) -> None:
    (message_id,) = await ledger.publish(domain.Misread(subject_id=uuid4()))
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert "publish inside `async with delivery.begin()" in row["errors"]


async def test_system_exit_in_a_consumer_is_a_failure_like_others(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("system_exit")
    await runner.deliver(message_id)
    assert await ledger.state(message_id) == "pending"


async def test_an_unknown_consumer_burns_no_attempt_and_dies_after_a_day(
    ledger: Ledger, runner: Runner, settings: Settings
) -> None:
    message_id = await ledger.happen()
    await ledger.set(message_id, consumer="ledger.not_deployed")
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert row["due_in"] > 0.5
    await ledger.connection.execute(
        """UPDATE outbox_message SET due_at = now() - interval '1 s',
           errors = jsonb_set(errors, '{0,at}', to_jsonb(now() - interval '25 hours')) WHERE id = $1""",
        message_id,
    )
    await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert "no consumer named ledger.not_deployed is deployed" in dead["reason"]


async def test_an_unknown_consumers_row_dies_whatever_its_first_error_was(ledger: Ledger, runner: Runner) -> None:
    """Only the first error and the latest are kept; a day of releases is more of them."""
    message_id = await ledger.happen("fail")
    await runner.deliver(message_id)
    await ledger.set(message_id, consumer="ledger.not_deployed")
    for hours in range(25):
        assert await ledger.dead_letter(message_id) is None, hours
        await ledger.connection.execute(_AN_HOUR_LATER, message_id)
        await runner.deliver(message_id)
    dead = await ledger.dead_letter(message_id)
    assert dead is not None
    assert [each["type"] for each in json.loads(dead["errors"])][:2] == ["RuntimeError", "_UnknownConsumerError"]


async def test_an_earlier_deploy_does_not_shorten_the_patience_of_a_later_one(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen("fail")
    for consumer in ("ledger.not_deployed", "ledger.react", "ledger.not_deployed"):
        await ledger.set(message_id, consumer=consumer)
        for _ in range(25 if consumer == "ledger.react" else 1):
            await ledger.connection.execute(_AN_HOUR_LATER, message_id)
        await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    types = [each["type"] for each in json.loads(row["errors"])]
    assert types == ["_UnknownConsumerError", "RuntimeError", "_UnknownConsumerError"]


_AN_HOUR_LATER = """
UPDATE outbox_message SET due_at = now() - interval '1 second', errors = (
    SELECT jsonb_agg(error || jsonb_build_object('at', (error ->> 'at')::timestamptz - interval '1 hour'))
    FROM jsonb_array_elements(errors) AS error
) WHERE id = $1 AND errors <> '[]'
"""


async def test_a_newer_version_of_an_event_waits_for_a_newer_worker(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    await ledger.set(message_id, version=2)
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert await ledger.effects(message_id) == 0


async def test_a_field_this_worker_does_not_know_is_ignored(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    await ledger.connection.execute(
        """UPDATE outbox_message SET payload = payload || '{"added_later": 1}' WHERE id = $1""", message_id
    )
    await runner.deliver(message_id)
    assert await ledger.effects(message_id) == 1


async def test_a_hanging_consumer_is_ended_at_its_time_limit(ledger: Ledger, settings: Settings, raw: bool) -> None:
    settings.outbox.time_limit = 200
    engine = create_engine(settings.database, application_name="outbox-worker")
    runner = Runner(settings, engine)
    await runner.open()
    try:
        message_id = await ledger.happen("hang_inside", raw=raw)
        await runner.deliver(message_id)
    finally:
        await runner.close()
        await engine.dispose()
    row = await ledger.row(message_id)
    assert row is not None
    assert row["state"] == "pending"
    assert json.loads(row["errors"])[0]["type"] == "TimeLimitExceeded"
    assert await ledger.effects(message_id) == 0


async def test_the_server_ends_a_transaction_whose_consumer_ignores_its_time_limit(
    ledger: Ledger, settings: Settings, runner: Runner, raw: bool
) -> None:
    """Dramatiq abandons such a run while it goes on; its row is another run's by then."""
    settings.outbox.time_limit, settings.outbox.grace = 1_000, 0.5
    (message_id,) = await ledger.publish(domain.Stubborn(subject_id=uuid4(), raw=raw))
    gate = domain.Gate()
    domain.GATES[str(message_id)] = [gate]
    stubborn = asyncio.create_task(runner.deliver(message_id))
    await gate.reached.wait()
    try:
        await until(lambda: nobody_is_in_a_transaction(ledger))
        assert not stubborn.done()
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    finally:
        gate.opened.set()
        await stubborn
    assert await ledger.state(message_id) == "completed"
    assert await ledger.effects(message_id) == 1


async def nobody_is_in_a_transaction(ledger: Ledger) -> bool:
    return not await ledger.connection.fetchval(
        """SELECT count(*) FROM pg_stat_activity
           WHERE datname = current_database() AND application_name = 'outbox-worker' AND xact_start IS NOT NULL"""
    )


async def test_a_stopping_worker_releases_what_does_not_end(
    ledger: Ledger, settings: Settings, runner: Runner, raw: bool
) -> None:
    settings.outbox.shutdown_grace = 0.1
    message_id = await ledger.happen("hang_inside" if raw else "hang", raw=raw)
    run = asyncio.create_task(runner.deliver(message_id))

    async def is_running() -> bool:
        return await ledger.state(message_id) == "running"

    await until(is_running)
    runner.stop()
    await run
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert row["due_in"] <= 0


async def test_what_is_over_at_the_end_of_the_grace_is_written_and_not_released(
    ledger: Ledger, settings: Settings, runner: Runner
) -> None:
    """The effect is outside the database: releasing it would repeat it."""
    settings.outbox.shutdown_grace = 0.1
    (message_id,) = await ledger.publish(domain.GatedOutside(subject_id=uuid4()))
    await ledger.set(message_id, state="dispatched", dispatches=1)
    gate = domain.Gate()
    domain.GATES[str(message_id)] = [gate]
    run = asyncio.create_task(runner.deliver(message_id))
    await gate.reached.wait()
    async with ledger.connection.transaction():
        await ledger.connection.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", message_id)
        gate.opened.set()
        await until(lambda: blocked(ledger))
        runner.stop()
        await asyncio.sleep(0.3)  # the grace
    await run
    await runner.close()
    assert await ledger.state(message_id) == "completed"


async def test_nothing_begins_once_a_stopping_worker_has_released_its_runs(
    ledger: Ledger, settings: Settings, runner: Runner
) -> None:
    """Dramatiq's threads still take what comes in within a second; it would hold up the shutdown."""
    settings.outbox.shutdown_grace = 0.001
    runner.stop()
    await asyncio.sleep(0.05)  # the grace
    message_id = await ledger.happen("hang")
    async with asyncio.timeout(60):
        await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("pending", 0)


async def test_suspects_run_one_at_a_time(ledger: Ledger, runner: Runner) -> None:
    """The one that kills its worker takes no other with it."""
    ids = [(await ledger.publish(domain.Gated(subject_id=uuid4())))[0] for _ in range(3)]
    gates = {each: domain.Gate() for each in ids}
    for each, gate in gates.items():
        domain.GATES[str(each)] = [gate]
        await ledger.set(each, state="dispatched", dispatches=2, attempts=2, errors='[{"type": "WorkerLost"}]')
    runs = [asyncio.create_task(runner.deliver(each)) for each in ids]
    (inside,) = await until(lambda: [each for each in ids if gates[each].reached.is_set()])
    others = [each for each in ids if each != inside]
    for each in others:
        row = await ledger.row(each)
        assert row is not None
        assert (row["state"], row["attempts"]) == ("pending", 2)
    gates[inside].opened.set()
    await asyncio.gather(*runs)
    for each in others:
        gates[each].opened.set()
        await ledger.expire(each)
        await runner.deliver(each)
    assert await all_completed(ledger)
