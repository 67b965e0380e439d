"""A limited queue: never more at once, never more in a second, whoever dies and whatever the broker forgets."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import asyncpg
import pytest
import redis.asyncio

from relay.process.relay_session import SESSION
from service.database.driver import bound_waits
from service.ledger import delivering, limiting
from service.ledger.dispatching import NO_FLOOR, Pauses, take_due
from service.ledger.limited_dispatching import take_limited
from tests.proof.ledger import domain
from tests.proof.ledger.looks import blocked, dispatched
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from service.database.driver import Connection
    from service.dev.valkey import Valkey
    from service.ledger.delivering import Claim
    from service.ledger.limited_dispatching import Turn
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

PAUSES = Pauses(timedelta(seconds=60), timedelta(seconds=10), timedelta(seconds=60))
LEASE = timedelta(seconds=30)
ERROR = {"type": "RuntimeError", "message": "no", "traceback": ""}


class Hand:
    """A relay's hand, which the test leads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def over(self, *, expired_leases: bool = True, most: int = 100) -> Turn:
        """A turn in a transaction of its own."""
        async with self.connection.transaction():
            return await self.turn(expired_leases=expired_leases, most=most)

    async def turn(self, *, expired_leases: bool = True, most: int = 100) -> Turn:
        return await take_limited(
            self.connection, "ledger", NO_FLOOR, most, PAUSES, expired_leases=expired_leases
        )  # fmt: skip


@pytest.fixture
async def hand(connect: Connect) -> Hand:
    connection = await connect()
    await bound_waits(connection, **SESSION)
    return Hand(connection)


@pytest.fixture
async def worker(connect: Connect) -> Connection:
    return await connect()


async def limit(ledger: Ledger, concurrency: int | None = None, rate: float | None = None, burst: int = 1) -> None:
    await limiting.limit(
        ledger.connection, "ledger", concurrency, rate, burst if rate else None, by="test", why=None
    )  # fmt: skip


async def publish(ledger: Ledger, count: int) -> list[UUID]:
    return [(await ledger.publish())[0] for _ in range(count)]


def ids(turn: Turn) -> set[UUID]:
    return {UUID(each.delivery_id) for each in turn.batch.deliveries} if turn.batch else set()


async def claim(worker: Connection, delivery_id: UUID) -> Claim:
    claimed = await delivering.claim(worker, delivery_id, uuid4(), LEASE)
    assert claimed is not None
    return claimed


async def test_no_more_are_handed_over_than_may_run(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    await limit(ledger, concurrency=2)
    first, second, third, fourth = await publish(ledger, 4)
    assert ids(await hand.over()) == {first, second}
    assert await hand.over() == (None, None)
    running = await claim(worker, first)
    assert await hand.over() == (None, None)
    assert await delivering.complete(worker, running)
    assert ids(await hand.over()) == {third}
    failing = await claim(worker, second)
    assert await delivering.fail(worker, failing, ERROR, timedelta(minutes=1))
    assert ids(await hand.over()) == {fourth}
    dying = await claim(worker, third)
    assert await delivering.die(worker, dying, ERROR, "failed") is not None
    await ledger.expire(second)
    assert ids(await hand.over()) == {second}
    assert await hand.over() == (None, None)


async def test_what_is_due_again_keeps_its_slot(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    """The message may still be in the broker, and the worker only late."""
    await limit(ledger, concurrency=2)
    first, second, *_ = await publish(ledger, 5)
    await hand.over()
    await claim(worker, second)
    for each in (first, second):
        await ledger.expire(each)
    assert ids(await hand.over(expired_leases=False)) == {first}
    await ledger.expire(first)
    turn = await hand.over()
    assert ids(turn) == {first, second}
    assert turn.batch is not None
    assert (turn.batch.unclaimed, turn.batch.lost) == (1, 1)
    assert await hand.over() == (None, None)


async def test_a_suspect_that_is_set_apart_gives_its_slot_to_another(
    ledger: Ledger, hand: Hand, worker: Connection
) -> None:
    await limit(ledger, concurrency=1)
    first, second = await publish(ledger, 2)
    await hand.over()
    await claim(worker, first)
    await ledger.set(first, attempts=2)
    await ledger.expire(first)
    turn = await hand.over()
    assert turn.batch is not None
    assert turn.batch.suspects == 1
    assert ids(await hand.over()) == {second}


async def test_what_comes_again_is_not_kept_waiting_by_the_backlog(ledger: Ledger, hand: Hand) -> None:
    await limit(ledger, concurrency=1)
    first, *_ = await publish(ledger, 5)
    assert ids(await hand.over()) == {first}
    await ledger.expire(first)
    await ledger.connection.execute(
        "UPDATE outbox_message SET due_at = due_at - interval '1 hour' WHERE state = 'pending'"
    )
    assert ids(await hand.over()) == {first}


async def test_two_relays_together_stay_within_the_limit(ledger: Ledger, hand: Hand, connect: Connect) -> None:
    await limit(ledger, concurrency=2)
    await publish(ledger, 5)
    other = Hand(await connect())
    async with hand.connection.transaction():
        assert len(ids(await hand.turn())) == 2
        assert await other.over() == (None, None)
    assert await other.over() == (None, None)
    assert len(await at_once(ledger)) == 2


async def at_once(ledger: Ledger) -> Sequence[object]:
    return await ledger.connection.fetch("SELECT FROM outbox_message WHERE state IN ('dispatched', 'running')")


async def test_a_hand_over_that_fails_takes_no_slot(ledger: Ledger, hand: Hand) -> None:
    await limit(ledger, concurrency=2, rate=0.001, burst=2)
    await publish(ledger, 3)
    with suppress(ZeroDivisionError):
        async with hand.connection.transaction():
            assert len(ids(await hand.turn())) == 2
            raise ZeroDivisionError
    assert len(ids(await hand.over())) == 2


async def test_a_rate_counts_from_the_starts(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    """However long the message lay in the broker."""
    await limit(ledger, rate=2)
    first, second, third = await publish(ledger, 3)
    assert ids(await hand.over()) == {first}
    await ledger.connection.execute("UPDATE limited_queue SET empty_at = empty_at - interval '1 hour'")
    assert await hand.over() == (None, None)
    await claim(worker, first)
    turn = await hand.over()
    assert turn.batch is None
    assert turn.wait is not None
    assert 0 < turn.wait <= 0.5
    taken = await until(lambda: some(hand))
    assert taken == {second}
    apart = await ledger.connection.fetchval(
        """SELECT extract(epoch FROM dispatched_at - (SELECT started_at FROM outbox_message WHERE id = $1))::float8
           FROM outbox_message WHERE id = $2""",
        first,
        second,
    )
    assert apart >= 0.5
    assert await ledger.state(third) == "pending"


async def some(hand: Hand) -> set[UUID]:
    return ids(await hand.over())


async def test_a_burst_is_what_may_start_at_a_time(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    await limit(ledger, rate=0.01, burst=3)
    await publish(ledger, 9)
    taken = ids(await hand.over())
    assert len(taken) == 3
    for each in taken:
        assert await delivering.complete(worker, await claim(worker, each))
    turn = await hand.over()
    assert turn.batch is None
    assert turn.wait is not None
    assert 90 < turn.wait <= 100


async def test_a_rate_counts_what_starts_again(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    """A retry, and a run whose worker was lost; but not what is only handed over again."""
    await limit(ledger, rate=0.01, burst=2)
    first, second, _ = await publish(ledger, 3)
    assert ids(await hand.over()) == {first, second}
    await ledger.expire(first)
    assert ids(await hand.over()) == {first}
    await claim(worker, first)
    failing = await claim(worker, second)
    assert await delivering.fail(worker, failing, ERROR, timedelta())
    await ledger.expire(first)
    assert ids(await hand.over()) == set()


async def test_both_limits_hold_together(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    await limit(ledger, concurrency=3, rate=0.01, burst=2)
    await publish(ledger, 9)
    taken = ids(await hand.over())
    assert len(taken) == 2
    for each in taken:
        await claim(worker, each)
    assert ids(await hand.over()) == set()
    await ledger.connection.execute("UPDATE limited_queue SET empty_at = clock_timestamp() - interval '1 hour'")
    assert len(ids(await hand.over())) == 1


async def test_a_copy_of_a_message_starts_nothing_without_a_slot(ledger: Ledger, worker: Connection) -> None:
    """A relay may have died between the broker and its commit; a retry may come due while an old copy waits."""
    (pending,) = await publish(ledger, 1)
    running = await ledger.happen()
    mine = await claim(worker, running)
    await ledger.expire(running)
    await limit(ledger, concurrency=1)
    for each in (pending, running):
        assert await delivering.claim_free(worker, [(each, uuid4())], LEASE) == []
        assert await delivering.claim(worker, each, uuid4(), LEASE) is None
    assert await delivering.claim(worker, running, mine.token, LEASE) is not None
    assert await limiting.unlimit(worker, "ledger", by="ada", why=None)
    assert await delivering.claim(worker, pending, uuid4(), LEASE) is not None


@pytest.mark.parametrize("commits", [True, False])
async def test_a_worker_faster_than_the_dispatch_waits_for_it(
    ledger: Ledger, hand: Hand, worker: Connection, *, commits: bool
) -> None:
    await limit(ledger, concurrency=1)
    (delivery_id,) = await publish(ledger, 1)
    transaction = hand.connection.transaction()
    await transaction.start()
    assert ids(await hand.turn()) == {delivery_id}
    claiming = asyncio.create_task(delivering.claim(worker, delivery_id, uuid4(), LEASE))
    await until(lambda: blocked(ledger))
    await (transaction.commit() if commits else transaction.rollback())
    assert (await claiming is not None) == commits


async def test_a_relay_that_does_not_know_of_the_limit_hands_nothing_over(ledger: Ledger, hand: Hand) -> None:
    await publish(ledger, 3)
    await limit(ledger, concurrency=1)
    assert await take_due(hand.connection, "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True) is None


async def test_a_limit_counts_what_was_handed_over_before(ledger: Ledger, hand: Hand, worker: Connection) -> None:
    """Also by a relay that is at it at this moment."""
    handed_over, running, *_ = await publish(ledger, 7)
    async with hand.connection.transaction():
        await take_due(hand.connection, "ledger", NO_FLOOR, 2, PAUSES, expired_leases=True)
    await claim(worker, running)
    async with hand.connection.transaction():
        batch = await take_due(hand.connection, "ledger", NO_FLOOR, 1, PAUSES, expired_leases=True)
        assert batch is not None
        setting = asyncio.create_task(
            limiting.limit(worker, "ledger", 4, None, None, by="test", why=None)
        )  # fmt: skip
        await until(lambda: blocked(ledger))
    await setting
    assert len(ids(await hand.over())) == 1
    await limit(ledger, concurrency=5)
    assert len(ids(await hand.over())) == 1
    assert await hand.over() == (None, None)
    await delivering.complete(worker, await claim(worker, handed_over))
    assert len(ids(await hand.over())) == 1


@pytest.mark.slow
async def test_a_limit_gives_up_behind_a_hand_over_that_hangs(ledger: Ledger, hand: Hand) -> None:
    await publish(ledger, 1)
    async with hand.connection.transaction():
        await take_due(hand.connection, "ledger", NO_FLOOR, 1, PAUSES, expired_leases=True)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await limit(ledger, concurrency=1)
    assert await limiting.limited_queues(ledger.connection) == []


class Workers:
    """Take ids from the broker's list, and now and then die in the midst of a run.

    Attributes:
        most: Runs under a lease at once, at most.
        starts: When each began, by PostgreSQL's clock, in seconds.
        over: Set to end them.
    """

    def __init__(self, connect: Connect, broker: redis.asyncio.Redis, settings: Settings) -> None:
        self._connect = connect
        self._broker = broker
        self._key = f"{settings.broker.namespace}:ledger"
        self._lease = settings.outbox.lease
        self._ends: dict[UUID, float] = {}
        self.most = self.crashed = 0
        self.starts: list[float] = []
        self.over = False

    async def work(self, seed: int) -> None:
        chance, connection = random.Random(seed), await self._connect()
        while not self.over:
            message = await self._broker.lpop(self._key)
            if message is None:
                await asyncio.sleep(0.002)
                continue
            began, token = time.monotonic(), uuid4()
            claimed = await delivering.claim(
                connection, UUID(str(message).partition(":")[0]), token, timedelta(seconds=self._lease)
            )
            if claimed is not None:
                self._ends[token] = began + self._lease
                await self._run(connection, claimed, chance)

    async def _run(self, connection: Connection, claimed: Claim, chance: random.Random) -> None:
        created = "SELECT extract(epoch FROM created_at)::float8 FROM outbox_message WHERE id = $1"
        self.most = max(self.most, sum(end > time.monotonic() for end in self._ends.values()))
        self.starts.append(await connection.fetchval(created, claimed.id) + claimed.waited)
        await asyncio.sleep(chance.uniform(0.001, 0.01))
        del self._ends[claimed.token]
        if chance.random() < 0.05:
            self.crashed += 1
        elif chance.random() < 0.1:
            await delivering.fail(connection, claimed, ERROR, timedelta(milliseconds=20))
        else:
            await delivering.complete(connection, claimed)


@pytest.fixture
async def broker(own_broker: Valkey) -> AsyncIterator[redis.asyncio.Redis]:
    """One that the test may empty."""
    client = redis.asyncio.Redis.from_url(own_broker.url, decode_responses=True)
    yield client
    await client.aclose()


@pytest.mark.slow
@pytest.mark.parametrize(("concurrency", "rate", "burst"), [(3, None, 1), (None, 40.0, 2), (3, 60.0, 6)])
async def test_two_relays_crashing_workers_and_a_broker_that_forgets(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis, connect: Connect,
    concurrency: int | None, rate: float | None, burst: int,
) -> None:  # fmt: skip
    settings.outbox.redispatch_after, settings.outbox.lease = 0.3, 0.5
    settings.outbox.min_backoff, settings.outbox.max_backoff = 20, 100
    count = 120
    await publish(ledger, count)
    await limit(ledger, concurrency, rate, burst)
    workers = Workers(connect, broker, settings)

    async def wipe() -> None:
        while not workers.over:
            await asyncio.sleep(0.2)
            await broker.flushall()

    async with relaying(settings), relaying(settings):
        tasks = [asyncio.create_task(each) for each in (wipe(), *(workers.work(seed) for seed in range(8)))]
        try:
            await until(lambda: completed(ledger, count), timeout=120)
        finally:
            workers.over = True  # a cancellation is lost now and then in a client of the broker
            ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert ended == [None] * 9
    assert workers.crashed > 0
    assert workers.most <= (concurrency or 8)
    if rate is not None:
        assert over(sorted(workers.starts), rate, burst) == []


def over(starts: list[float], rate: float, burst: int) -> list[tuple[int, float]]:
    """Spans, by how many started in them and their seconds, in which more did than the rate allows."""
    spans = [
        (last - first + 1, starts[last] - starts[first])
        for first in range(len(starts))
        for last in range(first, len(starts))
    ]
    return [(number, seconds) for number, seconds in spans if number > burst + rate * seconds + 1e-3]


async def completed(ledger: Ledger, count: int) -> bool:
    done: int = await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'completed'")
    return done == count


async def test_a_limited_queue_keeps_no_other_waiting(ledger: Ledger, settings: Settings) -> None:
    await limit(ledger, concurrency=1)
    await publish(ledger, 5)
    async with relaying(settings):
        await until(lambda: any_dispatched(ledger))
        _, other = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: dispatched(ledger, other))


async def any_dispatched(ledger: Ledger) -> bool:
    return len(await at_once(ledger)) == 1
