"""Batch consumers: many deliveries in one transaction, of which each is still one."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from service.errors import ConsumerDefinitionError, DeliveryError
from service.ledger import batch_claims
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from service.outbox import Deliveries, consumer, publish
from service.outbox.running.batches import BatchRunner
from tests.proof.ledger import batched
from tests.proof.ledger.batched import SIZE, Counted, Timed, Weighed
from tests.proof.ledger.domain import Gate
from tests.proof.ledger.looks import blocked, effects_once
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    import asyncpg
    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger


@pytest.fixture
async def runner(settings: Settings, worker_engine: AsyncEngine) -> AsyncIterator[BatchRunner]:
    """A worker's, on the test's loop."""
    runner = BatchRunner(settings, worker_engine)
    await runner.open()
    yield runner
    await runner.close()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What the consumers were told, and have told."""
    yield
    batched.BATCHES.clear()
    batched.GATES.clear()


@pytest.fixture
def gate() -> Gate:
    """Where the next batch stands still in the middle of its effect."""
    gate = Gate()
    batched.GATES.append(gate)
    return gate


async def counted(ledger: Ledger, *ways: str, event: type[Counted | Timed | Weighed] = Counted) -> list[UUID]:
    """Publish one event for each way, and mark their deliveries as handed over."""
    ids = [(await ledger.publish(event(subject_id=uuid4(), how=how)))[0] for how in ways]
    for each in ids:
        await ledger.set(each, state="dispatched", dispatches=1)
    return ids


async def run(runner: BatchRunner, ids: list[UUID], name: str = "ledger.count") -> set[UUID]:
    """As a worker does with what has arrived; those that ran together."""
    tokens = {each: uuid4() for each in ids}
    batch = await runner.claim_together(name, tokens)
    together = {each.id for each in batch.claims} if batch else set()
    alone = [runner.deliver(each) for each in ids if each not in together]
    await asyncio.gather(*([runner.run_together(batch)] if batch else []), *alone)
    return together


async def rows(ledger: Ledger, ids: list[UUID]) -> list[asyncpg.Record]:
    found = [await ledger.row(each) for each in ids]
    return [each for each in found if each is not None]


async def ended(ledger: Ledger, ids: list[UUID]) -> list[str | None]:
    return [await ledger.state(each) for each in ids]


async def notes(ledger: Ledger) -> list[str]:
    return [row["note"] for row in await ledger.connection.fetch("SELECT note FROM effect ORDER BY note::int")]


async def test_a_batch_is_one_transaction(ledger: Ledger, runner: BatchRunner) -> None:
    ids = await counted(ledger, *[""] * SIZE)
    assert await run(runner, ids) == set(ids)
    assert await ended(ledger, ids) == ["completed"] * SIZE
    assert {row["attempts"] for row in await rows(ledger, ids)} == {1}
    assert await notes(ledger) == [str(SIZE)] * SIZE
    assert await ledger.connection.fetchval("SELECT count(DISTINCT xmin::text) FROM effect") == 1
    await effects_once(ledger)
    await run(runner, ids)  # copies of the messages
    await effects_once(ledger)


@pytest.mark.parametrize("how", ["fail", "die", "throw", "retry", "swallow"])
async def test_only_the_guilty_one_pays(ledger: Ledger, runner: BatchRunner, how: str) -> None:
    """One failure is enough to die, and nobody dies of another's."""
    ids = await counted(ledger, *[""] * 5, how, "", "")
    assert await run(runner, ids) == set(ids)
    assert await ended(ledger, ids) == ["completed"] * 5 + ["dead"] + ["completed"] * 2
    assert {(row["attempts"], row["errors"]) for row in await rows(ledger, ids)} == {(1, "[]")}
    assert batched.BATCHES == [8, 4, 4, 2, 2, 1, 1]
    letter = await ledger.dead_letter(ids[5])
    assert letter is not None
    assert letter["attempts"] == 1
    await effects_once(ledger)


async def test_what_has_failed_runs_alone(ledger: Ledger, runner: BatchRunner) -> None:
    ids = await counted(ledger, "fail", "", event=Weighed)
    await run(runner, ids, "ledger.weigh")
    more = await counted(ledger, "", "", event=Weighed)
    await ledger.set(ids[0], state="dispatched")
    assert await run(runner, [ids[0], *more], "ledger.weigh") == set(more)
    assert await ended(ledger, [*ids, *more]) == ["pending"] + ["completed"] * 3
    assert [row["attempts"] for row in await rows(ledger, ids)] == [2, 1]
    await ledger.set(ids[0], state="dispatched")
    await run(runner, [ids[0]], "ledger.weigh")
    assert await ended(ledger, ids) == ["dead", "completed"]


async def test_what_cannot_be_read_harms_no_other(ledger: Ledger, runner: BatchRunner) -> None:
    ids = await counted(ledger, "", "", "")
    await ledger.set(ids[1], payload='{"subject_id": "nobody"}')
    assert await run(runner, ids) == set(ids)
    assert await ended(ledger, ids) == ["completed", "dead", "completed"]


async def test_only_what_is_untouched_runs_together(ledger: Ledger, runner: BatchRunner) -> None:
    """All the rest goes the way that it goes without batches."""
    ids = await counted(ledger, *[""] * 8)
    late, newer, other, troubled, again, limited, laned, renamed = ids
    await ledger.connection.execute("UPDATE outbox_message SET expires_at = now() WHERE id = $1", late)
    await ledger.set(newer, version=3)
    await ledger.set(other, consumer="ledger.weigh")
    await ledger.set(troubled, errors='[{"type": "X", "attempt": 0, "at": "2026-01-01", "message": ""}]')
    await ledger.set(again, attempts=1, state="running")
    await ledger.expire(again)
    await ledger.set(renamed, consumer="ledger.tally")
    await ledger.set(limited, queue="limited", state="pending")
    await ledger.connection.execute(
        "INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('limited', 1, 'a test')"
    )
    await ledger.set(laned, lane="a-lane")
    plain = await counted(ledger, "")
    assert await run(runner, [*ids, *plain]) == {renamed, *plain}
    found = dict(zip(ids, await ended(ledger, ids), strict=True))
    assert found == {
        late: "completed", newer: "pending", other: "pending", troubled: "completed", again: "dead",
        limited: "pending", laned: "completed", renamed: "completed",
    }  # fmt: skip


async def test_a_batch_waits_for_what_is_being_handed_over(
    ledger: Ledger, runner: BatchRunner, connect: Connect
) -> None:
    """A worker is often faster than the relay's commit."""
    ids = [(await ledger.publish(Counted(subject_id=uuid4())))[0] for _ in range(SIZE)]
    relay = await connect()
    pauses = Pauses(timedelta(seconds=60), timedelta(seconds=10), timedelta(seconds=60))
    async with relay.transaction():
        assert await take_due(relay, "ledger", NO_FLOOR, 100, pauses, expired_leases=True)
        running = asyncio.create_task(run(runner, ids))
        await until(lambda: blocked(ledger))
    assert await running == set(ids)
    assert await notes(ledger) == [str(SIZE)] * SIZE


async def test_of_a_batch_that_has_lost_one_the_others_complete(
    ledger: Ledger, runner: BatchRunner, gate: Gate
) -> None:
    ids = await counted(ledger, *[""] * 4)
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    await ledger.set(ids[2], claim_token=uuid4())
    gate.opened.set()
    await running
    assert await ended(ledger, ids) == ["completed", "completed", "running", "completed"]
    assert [await ledger.effects(each) for each in ids] == [1, 1, 0, 1]
    assert batched.BATCHES == [4, 3]


async def test_a_batch_may_do_without_a_session(ledger: Ledger, runner: BatchRunner, gate: Gate) -> None:
    ids = await counted(ledger, *["raw"] * 4)
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    await ledger.set(ids[2], claim_token=uuid4())
    gate.opened.set()
    await running
    assert [await ledger.effects(each) for each in ids] == [1, 1, 0, 1]
    assert batched.BATCHES == [4, 3]


async def test_all_lost_at_once_are_not_run_again(ledger: Ledger, runner: BatchRunner, gate: Gate) -> None:
    ids = await counted(ledger, *[""] * 4)
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    await ledger.connection.execute("UPDATE outbox_message SET claim_token = gen_random_uuid()")
    gate.opened.set()
    await running
    assert [await ledger.effects(each) for each in ids] == [0] * 4
    assert batched.BATCHES == [4]


async def test_what_is_handed_over_again_meanwhile_completes(ledger: Ledger, runner: BatchRunner, gate: Gate) -> None:
    ids = await counted(ledger, *[""] * 4)
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    await ledger.set(ids[0], state="dispatched", dispatches=2)
    gate.opened.set()
    await running
    assert await ended(ledger, ids) == ["completed"] * 4


async def test_none_completes_in_another_transaction(ledger: Ledger, runner: BatchRunner, connect: Connect) -> None:
    batch = await runner.claim_together("ledger.count", {each: uuid4() for each in await counted(ledger, "", "")})
    assert batch is not None
    connection, mark = await connect(), uuid4()
    async with connection.transaction():
        assert await batch_claims.complete_in_transaction(connection, batch.claims, mark) == (False, frozenset())
        await connection.execute(f"SET LOCAL outbox.transaction = '{mark}'")
        unbroken, mine = await batch_claims.complete_in_transaction(connection, batch.claims, mark)
        assert (unbroken, len(mine)) == (True, 2)


@pytest.mark.parametrize("how", ["driver_commit", "another_transaction"])
async def test_a_transaction_that_was_ended_inside_is_not_run_again(
    ledger: Ledger, runner: BatchRunner, how: str
) -> None:
    """Half of its effect may be there."""
    ids = await counted(ledger, "", how, "")
    await run(runner, ids)
    assert await ended(ledger, ids) == ["dead"] * 3
    assert batched.BATCHES == [3]


async def test_a_lost_database_is_nobodys_attempt(ledger: Ledger, runner: BatchRunner) -> None:
    """And whoever was there when it was lost runs alone, for one of them may be what ends it."""
    ids = await counted(ledger, "", "kill_backend", "")
    await run(runner, ids)
    assert await ended(ledger, ids) == ["pending"] * 3
    assert {row["attempts"] for row in await rows(ledger, ids)} == {0}
    for each in ids:
        await ledger.set(each, state="dispatched")
    assert await run(runner, ids) == set()
    assert await ended(ledger, ids) == ["completed", "pending", "completed"]
    await effects_once(ledger)


@pytest.mark.slow
async def test_a_batch_that_takes_too_long_is_halved(ledger: Ledger, runner: BatchRunner) -> None:
    ids = await counted(ledger, "", "hang", "", "", event=Timed)
    await run(runner, ids, "ledger.time")
    assert await ended(ledger, ids) == ["completed", "dead", "completed", "completed"]
    letter = await ledger.dead_letter(ids[1])
    assert letter is not None
    assert letter["reason"] == "failed 1 times"
    await effects_once(ledger)


@pytest.mark.slow
async def test_the_heartbeat_keeps_all_leases_also_of_halves(
    ledger: Ledger, settings: Settings, worker_engine: AsyncEngine
) -> None:
    """For longer than one run may take: they are counted from the claim."""
    settings.outbox.lease, settings.outbox.grace = 1, 0.5
    runner = BatchRunner(settings, worker_engine)
    await runner.open()
    last = Gate()
    batched.GATES += [Gate(), last, Gate()]  # all, one half, the other half
    ids = await counted(ledger, *[""] * 4, event=Timed)
    running = asyncio.create_task(run(runner, ids, "ledger.time"))
    await last.reached.wait()
    assert batched.BATCHES == [4, 2, 2]
    await ledger.connection.execute("SELECT pg_sleep(0.9)")
    left = await ledger.connection.fetch("SELECT state, due_at > clock_timestamp() AS kept FROM outbox_message")
    assert [tuple(row) for row in left] == [("running", True)] * 4
    runner.stop()
    running.cancel()
    await asyncio.wait([running])
    await runner.close()


async def test_a_stop_releases_all_of_them(ledger: Ledger, settings: Settings, worker_engine: AsyncEngine) -> None:
    settings.outbox.shutdown_grace = 0
    runner = BatchRunner(settings, worker_engine)
    await runner.open()
    gate = Gate()
    batched.GATES.append(gate)
    ids = await counted(ledger, *[""] * 4)
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    runner.stop()
    await running
    assert await ended(ledger, ids) == ["pending"] * 4
    assert {row["attempts"] for row in await rows(ledger, ids)} == {0}
    assert await ledger.connection.fetchval("SELECT count(*) FROM effect") == 0
    more = await counted(ledger, "", "")
    await run(runner, more)
    assert await ended(ledger, more) == ["pending"] * 2
    assert batched.BATCHES == [4]
    await runner.close()


async def test_without_a_transaction_all_are_completed_on_return(
    ledger: Ledger, runner: BatchRunner, gate: Gate
) -> None:
    ids = await counted(ledger, "outside", "outside", "")
    running = asyncio.create_task(run(runner, ids))
    await gate.reached.wait()
    await ledger.set(ids[1], claim_token=uuid4())
    gate.opened.set()
    await running
    assert await ended(ledger, ids) == ["completed", "running", "completed"]
    assert batched.BATCHES == [3]


async def test_an_answer_that_was_lost_costs_no_attempt(
    ledger: Ledger, runner: BatchRunner, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks alone then does so under the same token."""
    ids = await counted(ledger, "", "")
    tokens = {each: uuid4() for each in ids}
    claim = batch_claims.claim

    async def claim_unheard(*arguments: object, **options: object) -> None:
        await claim(*arguments, **options)  # type: ignore[arg-type]
        raise ConnectionResetError

    monkeypatch.setattr(batch_claims, "claim", claim_unheard)
    assert await runner.claim_together("ledger.count", tokens) is None
    for each in ids:
        alone = await runner.claim(each, tokens[each])
        assert alone is not None
        await runner.run(alone)
    assert await ended(ledger, ids) == ["completed"] * 2
    assert {row["attempts"] for row in await rows(ledger, ids)} == {1}


async def test_what_a_batch_is_told(ledger: Ledger, runner: BatchRunner) -> None:
    seen: list[Deliveries] = []

    class Noted(batched.Weighed, type="ledger.noted"):
        pass

    @consumer(Noted, queue="ledger", name="ledger.note", batch=3)
    async def note(events: list[Noted], deliveries: Deliveries) -> None:
        seen.append(deliveries)
        assert [event.how for event in events] == ["a", "b", "c"]
        async with deliveries.read() as session:
            assert session is not None
        async with deliveries.begin() as session:
            publish(session, Counted(subject_id=uuid4()))

    ids = await counted(ledger, "a", "b", "c", event=Noted)
    await run(runner, ids, "ledger.note")
    (deliveries,) = seen
    assert len(deliveries) == 3
    assert [each.idempotency_key for each in deliveries] == [str(each) for each in ids]
    assert [each.attempt for each in deliveries[1:]] == [1, 1]
    with pytest.raises(DeliveryError, match=r"deliveries\.begin"):
        deliveries[0].begin()
    with pytest.raises(DeliveryError, match=r"deliveries\.connection"):
        deliveries[0].connection()
    assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE consumer = 'ledger.count'") == 1


async def together(_events: list[Counted], _deliveries: Deliveries) -> None: ...


def alone(_events: list[Counted], _deliveries: Deliveries) -> None: ...


@pytest.mark.parametrize(
    ("fn", "options", "why"),
    [(together, {"order_by": "subject_id"}, "in order"), (alone, {}, "`def`"), (together, {"batch": 0}, "from 1 to")],
)
def test_a_batch_that_cannot_be_is_refused(fn: Callable[..., object], options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConsumerDefinitionError, match=why):
        consumer(Counted, queue="ledger", name="ledger.odd", **{"batch": 2} | options)(fn)
