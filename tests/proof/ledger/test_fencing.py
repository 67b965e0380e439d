"""Nothing happens twice: claims, tokens and from-states against copies, lost replies and zombies."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest

from service.ledger import delivering
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from tests.proof.ledger import domain
from tests.proof.ledger.looks import blocked
from tests.waiting import until

if TYPE_CHECKING:
    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Connect, Ledger

LEASE = timedelta(seconds=30)
T = timedelta(seconds=60)
PAUSES = Pauses(T, timedelta(seconds=10), timedelta(seconds=60))


@pytest.mark.parametrize("state", ["pending", "dispatched", "running"])
async def test_a_worker_faster_than_the_relays_commit_still_claims(
    ledger: Ledger, runner: Runner, connect: Connect, state: str
) -> None:
    """READ COMMITTED re-checks only rows whose committed version matches: it must match before the dispatch, too."""
    (message_id,) = await ledger.publish()
    await ledger.set(message_id, state=state)
    await ledger.expire(message_id)
    relay = await connect()
    async with relay.transaction():
        batch = await take_due(relay, "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
        assert batch is not None
        delivery = asyncio.create_task(runner.deliver(message_id))
        await until(lambda: blocked(ledger))
    await delivery
    assert await ledger.effects(message_id) == 1


async def test_a_claim_whose_reply_was_lost_can_be_repeated(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    token = uuid4()
    worker = await connect()
    assert await delivering.claim(worker, message_id, token, LEASE)
    again = await delivering.claim(worker, message_id, token, LEASE)
    assert again is not None
    assert again.attempts == 1


async def test_a_running_row_is_not_claimed_by_another(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    worker = await connect()
    assert await delivering.claim(worker, message_id, uuid4(), LEASE)
    assert await delivering.claim(worker, message_id, uuid4(), LEASE) is None


async def test_first_claims_need_not_wait_for_the_disk_and_later_ones_must(ledger: Ledger, connect: Connect) -> None:
    """Otherwise a message that crashes its backend never runs out of attempts."""
    message_id = await ledger.happen()
    worker = await connect()
    await worker.execute("SET synchronous_commit = on")
    for dispatches, expected in ((1, "off"), (2, "on")):
        await ledger.set(message_id, dispatches=dispatches, state="dispatched")
        async with worker.transaction():
            await delivering.claim(worker, message_id, uuid4(), LEASE)
            assert await worker.fetchval("SHOW synchronous_commit") == expected


async def test_a_lease_is_counted_from_the_end_of_a_lock_wait(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    locker, worker = await connect(), await connect()
    async with locker.transaction():
        await locker.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", message_id)
        claim = asyncio.create_task(delivering.claim(worker, message_id, uuid4(), timedelta(seconds=2)))
        await until(lambda: blocked(ledger))
        await locker.execute("SELECT pg_sleep(1.2)")
    await claim
    row = await ledger.row(message_id)
    assert row is not None
    assert row["due_in"] > 1.5


async def recovered(ledger: Ledger, message_id: UUID, _runner: Runner) -> None:
    await ledger.set(message_id, state="pending")


async def handed_out_and_claimed(ledger: Ledger, message_id: UUID, runner: Runner) -> None:
    await ledger.set(message_id, state="dispatched", dispatches=2)
    await runner.deliver(message_id)


async def dead(ledger: Ledger, message_id: UUID, runner: Runner) -> None:
    await ledger.set(message_id, state="dispatched", dispatches=2, attempts=3)
    await runner.deliver(message_id)


async def replayed(ledger: Ledger, message_id: UUID, runner: Runner) -> None:
    await dead(ledger, message_id, runner)
    await ledger.connection.execute(
        """INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
           SELECT message_id, event_id, event_type, version, consumer, queue, payload, headers
           FROM dead_letter WHERE message_id = $1""",
        message_id,
    )


async def purged(ledger: Ledger, message_id: UUID, runner: Runner) -> None:
    await handed_out_and_claimed(ledger, message_id, runner)
    await ledger.connection.execute("DELETE FROM outbox_message WHERE id = $1", message_id)


@pytest.mark.parametrize(
    ("meanwhile", "effects"),
    [(recovered, 0), (handed_out_and_claimed, 1), (dead, 0), (replayed, 0), (purged, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
async def test_a_zombie_has_no_effect(
    ledger: Ledger, runner: Runner, meanwhile: object, effects: int, raw: bool
) -> None:
    """A worker that comes back to life in mid-effect, after others took its row through the states."""
    (message_id,) = await ledger.publish(domain.Gated(subject_id=uuid4(), raw=raw))
    await ledger.set(message_id, state="dispatched", dispatches=1)
    gate = domain.Gate()
    domain.GATES[str(message_id)] = [gate]
    zombie = asyncio.create_task(runner.deliver(message_id))
    await gate.reached.wait()
    await meanwhile(ledger, message_id, runner)  # type: ignore[operator]
    before = await ledger.state(message_id)
    gate.opened.set()
    await zombie
    assert await ledger.effects(message_id) == effects
    assert await ledger.state(message_id) == before


async def test_a_zombie_has_no_effect_while_another_worker_runs_its_row(
    ledger: Ledger, runner: Runner, raw: bool
) -> None:
    (message_id,) = await ledger.publish(domain.Gated(subject_id=uuid4(), raw=raw))
    await ledger.set(message_id, state="dispatched", dispatches=1)
    one, two = domain.Gate(), domain.Gate()
    domain.GATES[str(message_id)] = [one, two]
    zombie = asyncio.create_task(runner.deliver(message_id))
    await one.reached.wait()
    await ledger.set(message_id, state="dispatched", dispatches=2)
    second = asyncio.create_task(runner.deliver(message_id))
    await two.reached.wait()
    one.opened.set()
    await zombie
    assert await ledger.effects(message_id) == 0
    two.opened.set()
    await second
    assert await ledger.effects(message_id) == 1


@pytest.mark.parametrize("how", ["fail", "die", "outside"])
async def test_a_zombies_outcome_is_not_written(ledger: Ledger, connect: Connect, how: str) -> None:
    """Fail, die and complete match the token: the row of the second claim stays as it is."""
    message_id = await ledger.happen()
    worker = await connect()
    zombie = await delivering.claim(worker, message_id, uuid4(), LEASE)
    assert zombie is not None
    await ledger.expire(message_id)
    assert await delivering.claim(worker, message_id, uuid4(), LEASE)
    error = {"type": "E", "message": "", "traceback": ""}
    match how:
        case "fail":
            assert not await delivering.fail(worker, zombie, error, LEASE)
        case "die":
            assert await delivering.die(worker, zombie, error, "gone") is None
        case "outside":
            assert not await delivering.complete(worker, zombie)
    await delivering.release(worker, zombie)
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["attempts"]) == ("running", 2)


async def test_a_late_failure_after_a_commit_whose_reply_was_lost_changes_nothing(
    ledger: Ledger, connect: Connect
) -> None:
    """State counts beside the token: the completed row keeps the token of the run that completed it."""
    message_id = await ledger.happen()
    worker = await connect()
    mine = await delivering.claim(worker, message_id, uuid4(), LEASE)
    assert mine is not None
    assert await delivering.complete(worker, mine)
    error = {"type": "E", "message": "", "traceback": ""}
    assert not await delivering.fail(worker, mine, error, LEASE)
    assert await delivering.die(worker, mine, error, "gone") is None
    assert await ledger.state(message_id) == "completed"


async def test_a_heartbeat_extends_only_its_own_claims(ledger: Ledger, connect: Connect) -> None:
    mine, others = await ledger.happen(), await ledger.happen()
    worker = await connect()
    token = uuid4()
    short = timedelta(seconds=1)
    assert await delivering.claim(worker, mine, token, short)
    assert await delivering.claim(worker, others, uuid4(), short)
    await delivering.heartbeat(worker, [(mine, token, T), (others, token, T)], LEASE)
    due_in = [row["due_in"] for row in (await ledger.row(mine), await ledger.row(others)) if row]
    assert due_in[0] > 25
    assert due_in[1] <= 1


async def test_a_heartbeat_takes_a_row_back_that_was_handed_out_again(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    worker = await connect()
    token = uuid4()
    assert await delivering.claim(worker, message_id, token, LEASE)
    await ledger.set(message_id, state="dispatched", dispatches=2)
    await delivering.heartbeat(worker, [(message_id, token, T)], LEASE)
    assert await ledger.state(message_id) == "running"


@pytest.mark.parametrize("end", ["fail", "release", "forgive"])
async def test_a_late_heartbeat_does_not_take_a_row_back_that_was_put_back(
    ledger: Ledger, connect: Connect, end: str
) -> None:
    """It may be under way when its run ends, and the row is handed over again within the millisecond."""
    message_id = await ledger.happen()
    worker, late = await connect(), uuid4()
    claim = await delivering.claim(worker, message_id, late, LEASE)
    assert claim is not None
    match end:
        case "fail":
            assert await delivering.fail(worker, claim, {}, timedelta(0))
        case "release":
            await delivering.release(worker, claim)
        case "forgive":
            assert await delivering.forgive(worker, claim, {}, timedelta(0))
    assert await take_due(worker, "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
    await delivering.heartbeat(worker, [(message_id, late, T)], LEASE)
    assert await ledger.state(message_id) == "dispatched"


async def test_a_heartbeat_never_goes_past_the_longest_run(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    worker = await connect()
    token = uuid4()
    assert await delivering.claim(worker, message_id, token, LEASE)
    await delivering.heartbeat(worker, [(message_id, token, timedelta(seconds=3))], LEASE)
    row = await ledger.row(message_id)
    assert row is not None
    assert row["due_in"] <= 3


async def test_a_heartbeat_does_not_wait_for_a_complete(ledger: Ledger, connect: Connect) -> None:
    first, second = await ledger.happen(), await ledger.happen()
    worker, completing = await connect(), await connect()
    token = uuid4()
    for message_id in (first, second):
        assert await delivering.claim(worker, message_id, token, timedelta(seconds=1))
    async with completing.transaction():
        await completing.execute("SELECT FROM outbox_message WHERE id = $1 FOR UPDATE", first)
        async with asyncio.timeout(30):
            await delivering.heartbeat(worker, [(first, token, T), (second, token, T)], LEASE)
    row = await ledger.row(second)
    assert row is not None
    assert row["due_in"] > 25


@pytest.mark.slow
async def test_a_blocked_event_loop_keeps_its_lease(ledger: Ledger, runner: Runner, database_url: str) -> None:
    """The lease is 2 s; the consumer blocks the worker's loop for 3 s, and another worker tries to take the row."""
    message_id = await ledger.happen("block")
    stolen: list[object] = []

    async def try_to_steal() -> None:
        connection = await asyncpg.connect(database_url)
        try:
            while (
                await connection.fetchval("SELECT state FROM outbox_message WHERE id = $1", message_id) != "completed"
            ):
                stolen.append(
                    await delivering.claim(connection, message_id, uuid4(), LEASE) if started.is_set() else None
                )
        finally:
            await connection.close()

    started = threading.Event()
    thief = threading.Thread(target=lambda: asyncio.run(try_to_steal()))
    thief.start()
    delivery = asyncio.create_task(runner.deliver(message_id))
    await until(lambda: ledger_is(ledger, message_id, "running"), every=0.001)
    started.set()
    await delivery
    await asyncio.to_thread(thief.join)
    assert await ledger.effects(message_id) == 1
    assert stolen
    assert not any(stolen)


async def ledger_is(ledger: Ledger, message_id: UUID, state: str) -> bool:
    return await ledger.state(message_id) == state


async def test_poison_and_its_neighbours_are_put_apart_after_a_second_loss(ledger: Ledger, connect: Connect) -> None:
    ids = [await ledger.happen() for _ in range(4)]
    for message_id in ids:
        await ledger.set(message_id, state="running", attempts=2, claim_token=uuid4())
        await ledger.expire(message_id)
    fresh = await ledger.happen()
    batch = await take_due(await connect(), "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
    assert batch is not None
    assert ([row.delivery_id for row in batch.deliveries], batch.suspects) == ([str(fresh)], 4)
    rows = [row for row in [await ledger.row(message_id) for message_id in ids] if row]
    assert {row["state"] for row in rows} == {"pending"}
    assert all(4 < row["due_in"] <= 10 for row in rows)
    assert len({round(row["due_in"], 3) for row in rows}) > 1
    assert json.loads(rows[0]["errors"])[0]["type"] == "WorkerLost"


async def test_an_old_message_does_not_bring_a_suspect_back(ledger: Ledger, runner: Runner) -> None:
    """The broker gives the messages of a killed worker to the next one, all at once, and the relay may be busy."""
    suspect, lost_once = await ledger.happen(), await ledger.happen()
    for message_id, attempts in ((suspect, 2), (lost_once, 1)):
        await ledger.set(message_id, state="running", attempts=attempts, claim_token=uuid4())
        await ledger.expire(message_id)
        await runner.deliver(message_id)
    assert await ledger.state(lost_once) == "completed"
    assert await ledger.state(suspect) == "running"
    assert await ledger.effects(suspect) == 0


async def test_a_first_loss_goes_straight_out_again(ledger: Ledger, connect: Connect) -> None:
    message_id = await ledger.happen()
    await ledger.set(message_id, state="running", attempts=1, claim_token=uuid4())
    await ledger.expire(message_id)
    batch = await take_due(await connect(), "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
    assert batch is not None
    assert [row.delivery_id for row in batch.deliveries] == [str(message_id)]


async def test_workers_lost_in_every_attempt_mean_a_dead_letter(ledger: Ledger, runner: Runner) -> None:
    message_id = await ledger.happen()
    await ledger.set(message_id, attempts=3)
    await runner.deliver(message_id)
    letter = await ledger.dead_letter(message_id)
    assert letter is not None
    assert letter["reason"] == "worker lost"
    assert await ledger.effects(message_id) == 0


async def test_a_lost_backend_is_forgiven_three_times(ledger: Ledger, runner: Runner, raw: bool) -> None:
    """Outages use up no attempt; a message that kills its backend every time still runs out of them."""
    message_id = await ledger.happen("kill_backend", raw=raw)
    for loss in (1, 2, 3):
        await ledger.set(message_id, state="dispatched", dispatches=loss)
        await runner.deliver(message_id)
        row = await ledger.row(message_id)
        assert row is not None
        assert (row["state"], row["attempts"]) == ("pending", 0)
    for attempt in (1, 2, 3):
        assert await ledger.dead_letter(message_id) is None
        await ledger.set(message_id, state="dispatched", dispatches=3 + attempt)
        await runner.deliver(message_id)
    letter = await ledger.dead_letter(message_id)
    assert letter is not None
    assert letter["attempts"] == 3
    assert await ledger.effects(message_id) == 0
