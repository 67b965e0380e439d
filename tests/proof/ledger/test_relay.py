"""The relay hands over whatever is due, once per round, and counts no outage against any event."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
import redis.asyncio

from relay.brokers.redis_sender import RedisSender
from service.database.driver import connect
from service.ledger.dispatching import NO_FLOOR, Pauses, queue_heads, take_due
from service.ledger.message import DueDelivery
from tests.proof.ledger import domain
from tests.proof.ledger.looks import dispatched, sleeping
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from service.database.driver import Connection
    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.ledger.dispatching import QueueHead
    from service.settings import BrokerSettings, Settings
    from tests.proof.ledger.conftest import Connect, Ledger

PAUSES = Pauses(timedelta(seconds=60), timedelta(seconds=10), timedelta(seconds=60))


@pytest.fixture
async def broker(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(settings.broker.redis_url, decode_responses=True)
    yield client
    await client.aclose()


async def queued(broker: redis.asyncio.Redis, settings: Settings, queue: str = "ledger") -> list[str]:
    """The row ids that wait in a queue."""
    ids = await broker.lrange(f"{settings.broker.namespace}:{queue}", 0, -1)
    return [str(each).partition(":")[0] for each in ids]


async def test_an_event_reaches_the_queue(ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis) -> None:
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: queued(broker, settings))
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["dispatches"], row["attempts"]) == ("dispatched", 1, 0)
    assert await queued(broker, settings) == [str(message_id)]


async def test_a_notification_wakes_the_relay(ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis) -> None:
    settings.outbox.lease = 600  # by itself it would wake after 15 s
    async with relaying(settings):
        await until(lambda: sleeping(ledger))
        (message_id,) = await ledger.publish()
        await until(lambda: queued(broker, settings), timeout=12)
    assert await queued(broker, settings) == [str(message_id)]


async def test_an_event_right_after_another_is_not_kept_waiting(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause before another look is for rows that are due and locked, not for those that were just handed over."""
    monkeypatch.setattr("relay.process.loop.SHORTEST_SLEEP", 100.0)
    async with relaying(settings):
        for expected in range(1, 5):
            await ledger.publish()
            await until(lambda: has_queued(broker, settings, expected))  # noqa: B023


async def has_queued(broker: redis.asyncio.Redis, settings: Settings, expected: int) -> bool:
    return len(await queued(broker, settings)) >= expected


async def test_a_delayed_event_waits(ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis) -> None:
    (late,) = await ledger.publish(delay=timedelta(seconds=1))
    (prompt,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: queued(broker, settings))
        assert await queued(broker, settings) == [str(prompt)]
        await until(lambda: has(broker, settings, late))
    row = await ledger.row(late)
    assert row is not None
    assert row["dispatched_at"] >= row["created_at"] + timedelta(seconds=1)


async def has(broker: redis.asyncio.Redis, settings: Settings, message_id: UUID) -> bool:
    return str(message_id) in await queued(broker, settings)


async def test_what_no_worker_claims_is_handed_over_again(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    settings.outbox.redispatch_after = 0.3
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: queued(broker, settings))
        await broker.delete(f"{settings.broker.namespace}:ledger", f"{settings.broker.namespace}:ledger.msgs")
        await until(lambda: queued(broker, settings))
    row = await ledger.row(message_id)
    assert row is not None
    assert row["dispatches"] >= 2
    assert row["attempts"] == 0


async def test_what_the_broker_lost_in_part_is_queued_again(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    """The body that is left over must not pass for a message that is still queued."""
    settings.outbox.redispatch_after = 0.3
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: queued(broker, settings))
        await broker.delete(f"{settings.broker.namespace}:ledger")
        assert await broker.hlen(f"{settings.broker.namespace}:ledger.msgs")
        await until(lambda: has(broker, settings, message_id))


async def test_bodies_whose_list_was_deleted_are_removed(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    """But none that a worker holds."""
    key = f"{settings.broker.namespace}:ledger"
    held = f"{settings.broker.namespace}:__acks__.worker.ledger"
    ids = [str(uuid4()) for _ in range(4)]
    sender = RedisSender(settings.broker)
    await sender.hand_over("ledger", [DueDelivery(ids[0], "ledger.react", None)], "t1")
    await broker.zadd(f"{settings.broker.namespace}:__heartbeats__", {"worker": 1})
    await broker.sadd(held, str(await broker.lpop(key)))
    await sender.hand_over("ledger", [DueDelivery(ids[1], "ledger.react", None)], "t2")
    assert await broker.hlen(f"{key}.msgs") == 2
    await broker.delete(key, held)
    await sender.hand_over("ledger", [DueDelivery(ids[2], "ledger.react", None)], "t3")
    await sender.hand_over("ledger", [DueDelivery(ids[3], "ledger.react", None)], "t4")
    await sender.close()
    assert await broker.hkeys(f"{key}.msgs") == [f"{ids[2]}:t3", f"{ids[3]}:t4"]


async def test_the_pause_before_another_hand_over_is_bounded(ledger: Ledger, connect: Connect) -> None:
    """An interval out of range would abort the batch for ever."""
    (message_id,) = await ledger.publish()
    relay = await connect()
    for dispatches, expected in ((0, 60), (1, 120), (3, 480), (2_000_000_000, 480)):
        await ledger.set(message_id, dispatches=dispatches, state="dispatched")
        await ledger.expire(message_id)
        assert await take_due(relay, "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
        row = await ledger.row(message_id)
        assert row is not None
        assert abs((row["due_at"] - row["dispatched_at"]).total_seconds() - expected) < 1


async def test_two_relays_skip_each_others_rows(ledger: Ledger, connect: Connect) -> None:
    for _ in range(4):
        await ledger.publish()
    one, two = await connect(), await connect()
    async with one.transaction(), two.transaction():
        first = await take_due(one, "ledger", NO_FLOOR, 2, PAUSES, expired_leases=True)
        async with asyncio.timeout(30):
            second = await take_due(two, "ledger", NO_FLOOR, 10, PAUSES, expired_leases=True)
    assert first is not None
    assert second is not None
    assert len({row.delivery_id for row in first.deliveries} | {row.delivery_id for row in second.deliveries}) == 4


async def test_what_commits_late_below_the_floor_is_found(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis, connect: Connect
) -> None:
    late = await connect()
    transaction = late.transaction()
    await transaction.start()
    await late.execute(INSERT, uuid4())
    async with relaying(settings):
        for _ in range(5):
            await ledger.publish()
        await until(lambda: count_is(broker, settings, 5))
        await transaction.commit()
        await until(lambda: count_is(broker, settings, 6))


async def test_what_commits_late_below_the_floor_does_not_wait_for_the_backlog(
    ledger: Ledger, settings: Settings, connect: Connect
) -> None:
    settings.outbox.high_water_mark, settings.outbox.batch_size = 100_000, 1
    late, late_id = await connect(), uuid4()
    transaction = late.transaction()
    await transaction.start()
    await late.execute(INSERT, late_id)
    await ledger.connection.executemany(INSERT, [(uuid4(),) for _ in range(5_000)])
    async with relaying(settings):
        await until(lambda: some_dispatched(ledger))
        await transaction.commit()
        await until(lambda: dispatched(ledger, late_id))
        assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")


async def some_dispatched(ledger: Ledger) -> bool:
    return bool(await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'dispatched'"))


INSERT = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES ($1, $1, 'ledger.happened', 1, 'ledger.react', 'ledger', '{}', '{}')
"""


async def count_is(broker: redis.asyncio.Redis, settings: Settings, count: int) -> bool:
    return len(await queued(broker, settings)) == count


async def test_a_repeated_call_within_a_transaction_queues_once(settings: Settings, ledger: Ledger) -> None:
    """A later transaction must not be suppressed by it: its dispatch is needed."""
    sender = RedisSender(settings.broker)
    batch = [DueDelivery(str(uuid4()), "ledger.react", None)]
    assert await sender.hand_over("ledger", batch, "t1") == 1
    assert await sender.hand_over("ledger", batch, "t1") == 1
    assert await sender.hand_over("ledger", batch, "t2") == 2
    await sender.close()


async def test_a_broker_outage_counts_against_no_event(ledger: Ledger, settings: Settings, own_valkey: Valkey) -> None:
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    own_valkey.stop()
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: relay_waits(ledger))
        row = await ledger.row(message_id)
        assert row is not None
        assert (row["state"], row["dispatches"], row["attempts"]) == ("pending", 0, 0)
        own_valkey.start()
        await until(lambda: dispatched(ledger, message_id))


async def relay_waits(ledger: Ledger) -> bool:
    """Whether the relay has been through a failed hand-over: it then asks PostgreSQL only whether it is there."""
    return bool(
        await ledger.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outbox-relay' AND query = 'SELECT 1' "
            "AND datname = current_database()"
        )
    )


async def test_a_trace_of_another_form_is_left_out_and_its_neighbours_keep_theirs(
    settings: Settings, broker: redis.asyncio.Redis
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    traces = {str(uuid4()): each for each in (trace, "odd", None, trace.upper(), trace)}
    sender = RedisSender(settings.broker)
    await sender.hand_over("ledger", [DueDelivery(each, "ledger.react", traces[each]) for each in traces], "t")
    await sender.close()
    bodies = map(json.loads, await broker.hvals(f"{settings.broker.namespace}:ledger.msgs"))
    passed_on = {body["message_id"]: body["options"].get("traceparent") for body in bodies}
    assert passed_on == {each: trace if traces[each] == trace else None for each in traces}


class Watched(RedisSender):
    """Notes when it is asked for something, and the sizes of the batches that it handed over."""

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(settings)
        self.asked: list[float] = []
        self.sizes: list[int] = []
        self.queues: list[str] = []

    async def hand_over(self, queue: str, batch: Sequence[DueDelivery], transaction: str) -> int:
        self.asked.append(time.monotonic())
        waiting = await super().hand_over(queue, batch, transaction)
        self.sizes.append(len(batch))
        self.queues.append(queue)
        return waiting

    async def ping(self) -> None:
        self.asked.append(time.monotonic())
        await super().ping()


async def test_a_broker_that_is_away_is_asked_less_and_less_often(
    ledger: Ledger, settings: Settings, own_valkey: Valkey
) -> None:
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    own_valkey.stop()
    sender = Watched(settings.broker)
    await ledger.publish()
    async with relaying(settings, sender):
        await until(lambda: len(sender.asked) > 4)
    assert sender.asked[4] - sender.asked[0] > 0.05 + 0.1 + 0.2 + 0.4


async def test_a_queue_that_refuses_is_asked_less_and_less_often(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    await broker.set(f"{settings.broker.namespace}:ledger", "not a list")
    sender = Watched(settings.broker)
    await ledger.publish()
    async with relaying(settings, sender):
        await until(lambda: len(sender.asked) > 3)
    assert sender.asked[3] - sender.asked[0] > 0.125 + 0.25 + 0.5


async def test_a_postgres_that_is_away_is_asked_less_and_less_often(settings: Settings) -> None:
    asked: list[float] = []

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(time.monotonic())
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings.database.url = type(settings.database.url)(f"postgresql://nobody@127.0.0.1:{port}/none?sslmode=disable")
    async with server, relaying(settings):
        await until(lambda: len(asked) > 4)
    assert asked[4] - asked[0] > 0.05 + 0.1 + 0.2 + 0.4


async def test_a_full_broker_counts_against_no_event(ledger: Ledger, settings: Settings, own_valkey: Valkey) -> None:
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1")
        (message_id,) = await ledger.publish()
        async with relaying(settings):
            await until(lambda: relay_waits(ledger))
            row = await ledger.row(message_id)
            assert row is not None
            assert (row["state"], row["dispatches"]) == ("pending", 0)
            await client.config_set("maxmemory", "0")
            await until(lambda: dispatched(ledger, message_id))


async def test_a_queue_that_refuses_leaves_the_others_alone(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    await broker.set(f"{settings.broker.namespace}:ledger", "not a list")
    refused, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    async with relaying(settings):
        await until(lambda: has_other(broker, settings, fine))
        assert await ledger.state(refused) == "pending"
        await broker.delete(f"{settings.broker.namespace}:ledger")
        await until(lambda: has(broker, settings, refused))


async def has_other(broker: redis.asyncio.Redis, settings: Settings, message_id: UUID) -> bool:
    return str(message_id) in await queued(broker, settings, "other")


async def test_a_backlog_waits_in_postgres(ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis) -> None:
    """A queue at its mark takes no more, and does not keep another queue waiting."""
    settings.outbox.high_water_mark, settings.outbox.batch_size = 10, 4
    for _ in range(30):
        await ledger.publish()
    async with relaying(settings):
        await until(lambda: count_is(broker, settings, 10))
        _, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        await until(lambda: has_other(broker, settings, fine))
        assert await count_is(broker, settings, 10)
        await broker.ltrim(f"{settings.broker.namespace}:ledger", 5, -1)
        await until(lambda: count_is(broker, settings, 10))


async def test_a_paused_queue_is_left_alone_until_it_is_resumed(
    ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis
) -> None:
    settings.outbox.lease = 600  # by itself it would look again after 15 s
    await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('ledger', 'test')")
    paused, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
    async with relaying(settings):
        await until(lambda: has_other(broker, settings, fine))
        assert await ledger.state(paused) == "pending"
        await ledger.connection.execute("WITH gone AS (DELETE FROM paused_queue) SELECT outbox_wake()")
        await until(lambda: has(broker, settings, paused), timeout=12)


@pytest.mark.slow
async def test_a_pause_stops_two_busy_relays(ledger: Ledger, settings: Settings) -> None:
    settings.outbox.high_water_mark, settings.outbox.batch_size = 100_000, 1
    await ledger.connection.execute(MANY, 20_000)
    async with relaying(settings), relaying(settings):
        await until(lambda: some_dispatched(ledger))
        await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('ledger', 'test')")
        await until(lambda: ledger.connection.fetchval(PAUSED_FOR_LONG))
        overrun = await ledger.connection.fetchval(
            """SELECT extract(epoch FROM max(dispatched_at) - (SELECT paused_at FROM paused_queue))::float8
               FROM outbox_message"""
        )
        # A second, and the batch at hand on a busy machine.
        assert overrun < 5
        assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")


PAUSED_FOR_LONG = "SELECT clock_timestamp() > paused_at + interval '8 s' FROM paused_queue"

MANY = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT id, id, 'ledger.happened', 1, 'ledger.react', 'ledger', '{}', '{}'
FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $1::int)) AS new
"""


@pytest.mark.slow
async def test_a_backlog_of_an_outage_is_handed_over_in_whole_batches_at_once(
    ledger: Ledger, settings: Settings, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings.outbox.batch_size, settings.outbox.high_water_mark = 4_000, 250, 100_000
    settings.outbox.redispatch_after = 600
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    own_valkey.stop()
    sender = Watched(settings.broker)
    await ledger.publish()
    async with relaying(settings, sender):
        await until(lambda: len(sender.asked) > 3)
        await ledger.connection.execute(MANY, rows - 1)
        tried = len(sender.asked) + 1
        await until(lambda: len(sender.asked) > tried)
        assert await counted(ledger) == [(0, 0, "pending", rows)]
        monkeypatch.setattr("relay.process.loop.SHORTEST_SLEEP", 100.0)
        own_valkey.start()
        await until(lambda: all_dispatched(ledger, rows))
    assert sender.sizes == [settings.outbox.batch_size] * (rows // settings.outbox.batch_size)
    assert await counted(ledger) == [(1, 0, "dispatched", rows)]


async def counted(ledger: Ledger) -> list[tuple[int, int, str, int]]:
    """Rows by their dispatches, attempts and state."""
    found = await ledger.connection.fetch(
        "SELECT dispatches, attempts, state, count(*) FROM outbox_message GROUP BY dispatches, attempts, state"
    )
    return [tuple(each) for each in found]


async def all_dispatched(ledger: Ledger, rows: int) -> bool:
    count = await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'dispatched'")
    return bool(count == rows)


@pytest.mark.slow
async def test_a_restarted_postgres_is_reconnected_and_running_rows_are_spared(
    settings: Settings, own_postgres: Postgres, broker: redis.asyncio.Redis
) -> None:
    """After an outage longer than a lease every healthy lease looks expired."""
    import asyncpg

    settings.outbox.lease = 4
    settings.database.url = type(settings.database.url)(own_postgres.url("service"))
    async with relaying(settings):
        connection = await asyncpg.connect(own_postgres.url("service"))
        running_id = uuid4()
        await connection.execute(INSERT, running_id)
        await until(lambda: has(broker, settings, running_id))
        await connection.close()
        own_postgres.stop(mode="immediate")
        await asyncio.sleep(1.5)  # the fault itself: longer than a healthy lease is sure to last
        own_postgres.start()
        connection = await asyncpg.connect(own_postgres.url("service"))
        await connection.execute(
            "UPDATE outbox_message SET state = 'running', attempts = 1, due_at = now() - interval '1 s'"
        )
        fresh = uuid4()
        await connection.execute(INSERT, fresh)
        await until(lambda: has(broker, settings, fresh))
        assert await connection.fetchval("SELECT state FROM outbox_message WHERE id = $1", running_id) == "running"

        async def handed_over() -> bool:
            state = await connection.fetchval("SELECT state FROM outbox_message WHERE id = $1", running_id)
            return bool(state == "dispatched")

        await until(handed_over)
        await connection.close()


ONE_EACH = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
SELECT id, id, 'ledger.happened', 1, 'ledger.react', 'ledger-' || number % $1::int, '{}', '{}'
FROM (SELECT gen_random_uuid() AS id, number FROM generate_series(0, $2::int - 1) AS number) AS new
"""


async def test_a_round_serves_somebody_however_long_a_look_takes(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look is due again all the time; each queue still has its turn, the one first that has waited longest."""
    queues, settings.outbox.batch_size = 20, 1
    monkeypatch.setattr("relay.process.loop._LOOK_EVERY", 0.0)
    monkeypatch.setattr("relay.process.loop._LOOKING", 0)
    await ledger.connection.execute(ONE_EACH, queues, 3 * queues)
    sender = Watched(settings.broker)
    async with relaying(settings, sender):
        await until(lambda: all_dispatched(ledger, 3 * queues), timeout=30)
    assert [len(set(sender.queues[first : first + queues])) for first in (0, queues, 2 * queues)] == [queues] * 3


@pytest.mark.slow
async def test_looks_that_take_long_come_seldom(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of them the relay hands over for some times as long."""
    looks: list[tuple[float, float]] = []

    async def slow_heads(connection: Connection) -> list[QueueHead]:
        began = time.monotonic()
        await connection.execute("SELECT pg_sleep(0.2)")
        heads = await queue_heads(connection)
        looks.append((began, time.monotonic()))
        return heads

    settings.outbox.high_water_mark, settings.outbox.batch_size = 100_000, 1
    monkeypatch.setattr("relay.process.loop.queue_heads", slow_heads)
    monkeypatch.setattr("relay.process.loop._LOOK_EVERY", 0.1)
    await ledger.connection.execute(MANY, 20_000)
    async with relaying(settings):
        await until(lambda: len(looks) > 4, timeout=30)
        assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")
    for (_, ended), (began, _) in pairwise(looks[1:]):  # the first one proves that the database is migrated
        assert began - ended >= 0.8


async def test_a_look_that_takes_too_long_is_told_of_but_not_each_time(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[float] = []

    async def counted_heads(connection: Connection) -> list[QueueHead]:
        looks.append(time.monotonic())
        await connection.execute("SELECT pg_sleep(0.02)")
        return await queue_heads(connection)

    monkeypatch.setattr("relay.process.loop.queue_heads", counted_heads)
    monkeypatch.setattr("relay.process.loop._SLOW_LOOK", 0.01)
    monkeypatch.setattr("relay.process.loop._LOOK_EVERY", 0.0)
    settings.outbox.batch_size = 1
    async with relaying(settings):
        await ledger.connection.execute(ONE_EACH, 3, 30)
        await until(lambda: all_dispatched(ledger, 30))
        await until(lambda: len(looks) > 4)
    assert capsys.readouterr().out.count("relay.slow_look") == 1


async def test_a_queue_that_was_empty_does_not_wait_for_the_next_look(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.outbox.high_water_mark, settings.outbox.batch_size = 100_000, 1
    await ledger.connection.execute(ONE_EACH, 1, 1)
    async with relaying(settings):
        await until(lambda: all_dispatched(ledger, 1))
        await ledger.connection.execute("DELETE FROM outbox_message")
        monkeypatch.setattr("relay.process.loop._LOOK_EVERY", 1_000.0)
        await ledger.connection.execute(MANY, 20_000)
        await until(lambda: some_dispatched(ledger))
        await ledger.connection.execute(ONE_EACH, 1, 1)
        await until(lambda: cold_is_dispatched(ledger), timeout=30)
        assert await ledger.connection.fetchval("SELECT count(*) FROM outbox_message WHERE state = 'pending'")


async def cold_is_dispatched(ledger: Ledger) -> bool:
    state = await ledger.connection.fetchval("SELECT state FROM outbox_message WHERE queue = 'ledger-0'")
    return bool(state == "dispatched")


async def test_a_full_queue_keeps_nobody_awake(
    ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay sleeps beside it, and is woken by what another queue is given."""
    monkeypatch.setattr("relay.process.loop.SHORTEST_SLEEP", 100.0)
    settings.outbox.high_water_mark, settings.outbox.batch_size, settings.outbox.lease = 10, 4, 600
    await ledger.connection.execute(MANY, 30)
    async with relaying(settings):
        await until(lambda: sleeping(ledger))
        await ledger.connection.execute(ONE_EACH, 1, 1)
        await until(lambda: cold_is_dispatched(ledger))


CONFLICT = """
CREATE SEQUENCE conflicts;
CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('conflicts') <= 2 THEN RAISE EXCEPTION USING ERRCODE = 'serialization_failure'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER conflict BEFORE UPDATE ON outbox_message FOR EACH ROW EXECUTE FUNCTION conflict();
"""


async def test_a_conflict_is_tried_again_on_the_same_connection(ledger: Ledger, settings: Settings) -> None:
    await ledger.connection.execute(CONFLICT)
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: relay_session(ledger))
        session = await relay_session(ledger)
        await until(lambda: dispatched(ledger, message_id))
        assert await relay_session(ledger) == session


async def test_another_default_isolation_changes_nothing(ledger: Ledger, settings: Settings) -> None:
    """Statements of the ledger look again at rows that somebody has changed meanwhile, at READ COMMITTED only."""
    name = await ledger.connection.fetchval("SELECT current_database()")
    await ledger.connection.execute(f'ALTER DATABASE "{name}" SET default_transaction_isolation = serializable')
    connection = await connect(settings.database, "outbox-test")
    assert await connection.fetchval("SHOW transaction_isolation") == "read committed"
    await connection.close()


async def relay_session(ledger: Ledger) -> int | None:
    """The process that serves the relay, once it is there."""
    number: int | None = await ledger.connection.fetchval(
        """SELECT pid FROM pg_stat_activity WHERE application_name = 'outbox-relay' AND query NOT LIKE '%pg_notify%'
           AND datname = current_database() ORDER BY backend_start LIMIT 1"""
    )
    return number


async def test_it_stops_in_mid_sleep(ledger: Ledger, settings: Settings) -> None:
    async with relaying(settings):
        await until(lambda: sleeping(ledger))
    assert not await sleeping(ledger)


async def test_bodies_are_dramatiqs_own(ledger: Ledger, settings: Settings, broker: redis.asyncio.Redis) -> None:
    (message_id,) = await ledger.publish()
    async with relaying(settings):
        await until(lambda: queued(broker, settings))
    ((unique, body),) = (await broker.hgetall(f"{settings.broker.namespace}:ledger.msgs")).items()
    decoded = json.loads(body)
    assert decoded["message_id"] == str(message_id)
    assert decoded["args"] == [str(message_id)]
    assert decoded["options"]["redis_message_id"] == unique
