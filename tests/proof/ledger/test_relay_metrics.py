"""What a relay tells Prometheus: each number moves with what it counts, and an outage leaves the old ones standing."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import asyncpg
import psutil
import pytest
import redis.asyncio

from relay.process import relay_metrics as metrics
from relay.process.purge import purge_regularly
from service.dev.servers import free_port
from service.ledger import statistics
from service.ledger.statistics import Key, ProcessIdentity, Runs
from service.telemetry.metrics import METRICS, Sample
from tests.proof.ledger import domain
from tests.servers.scraping import scrape, shows, watched
from tests.waiting import until

if TYPE_CHECKING:
    from service.dev.postgres import Postgres
    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger
    from tests.servers.processes import Processes

REACT = {"queue": "ledger", "consumer": "ledger.react"}

DEAD_LETTER = """
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                         dispatches, created_at, errors, reason)
SELECT id, event_id, event_type, version, consumer, queue, payload, headers, 3, 3, created_at, '[]', 'failed 3 times'
FROM outbox_message WHERE id = $1
"""

IN_LANE = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, lane, due_at)
SELECT gen_random_uuid(), event_id, event_type, version, consumer, queue, payload, headers, $1, outbox_parked()
FROM outbox_message LIMIT 1
"""


async def test_a_delivery_that_is_handed_over_moves_its_numbers(ledger: Ledger, settings: Settings) -> None:
    async with watched(settings):
        await ledger.publish(delay=timedelta(hours=1))
        await ledger.publish()
        page = await shows(settings, lambda page: page("outbox_open_deliveries", **REACT, state="dispatched"))
        page = await shows(settings, lambda page: page("outbox_broker_queue_messages", queue="ledger"))
    assert page("outbox_up", system="postgresql") == page("outbox_up", system="broker") == 1
    assert page("outbox_relays") == 1
    assert page("outbox_open_deliveries", **REACT, state="pending") == 1
    assert page("outbox_open_deliveries", **REACT, state="running") == 0
    assert page("outbox_relay_handed_over_total", queue="ledger") == 1
    assert page("outbox_relay_redispatched_total", queue="ledger") == 0
    assert page("outbox_relay_batch_seconds_count", queue="ledger") == 1
    assert page("outbox_relay_batch_seconds_bucket", queue="ledger", le="+Inf") == 1
    assert page("outbox_broker_queue_messages", queue="ledger") == 1
    assert page("outbox_worker_processes", queue="ledger") == 0
    assert page("outbox_oldest_due_seconds", queue="ledger") == 0


async def test_handed_over_again_and_taken_from_a_lost_worker_are_told_apart(
    ledger: Ledger, settings: Settings
) -> None:
    unclaimed = await ledger.happen()
    first_lost, suspect = await ledger.happen(), await ledger.happen()
    for id_, attempts in ((first_lost, 1), (suspect, 2)):
        await ledger.set(id_, state="running", attempts=attempts)
    for id_ in (unclaimed, first_lost, suspect):
        await ledger.expire(id_)
    settings.outbox.redispatch_after = 600
    settings.outbox.min_backoff = settings.outbox.max_backoff = 600_000
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_relay_workers_lost_total", queue="ledger") == 2)
    assert page("outbox_relay_handed_over_total", queue="ledger") == 2
    assert page("outbox_relay_redispatched_total", queue="ledger") == 1


async def test_what_waits_shows_by_the_second_and_by_state(ledger: Ledger, settings: Settings) -> None:
    failed, unclaimed = await ledger.happen(), await ledger.happen()
    await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('ledger', 'me')")
    await ledger.set(failed, state="pending", errors='[{"type": "RuntimeError"}]')
    await ledger.set(unclaimed, dispatches=4)
    await ledger.connection.execute("UPDATE outbox_message SET due_at = clock_timestamp() - interval '90 s'")
    await ledger.connection.execute(DEAD_LETTER, failed)
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_dead_letters", **REACT))
        assert page("outbox_dead_letters", **REACT) == 1
        assert page("outbox_retrying_deliveries", **REACT) == 1
        assert page("outbox_unclaimed_deliveries", **REACT) == 1
        assert page("outbox_queue_paused", queue="ledger") == 1
        assert page("outbox_queue_paused", queue="*") == 0
        assert page("outbox_queue_limited", queue="ledger") == 0
        assert 90 <= (page("outbox_oldest_due_seconds", queue="ledger") or 0) < 400
        await ledger.connection.execute("UPDATE paused_queue SET queue = '*'")
        page = await shows(settings, lambda page: page("outbox_queue_paused", queue="*"))
        assert page("outbox_queue_paused", queue="ledger") == 1
        await ledger.connection.execute("UPDATE dead_letter SET resolution = 'discarded', resolved_at = now()")
        await ledger.connection.execute("DELETE FROM outbox_message; DELETE FROM paused_queue")
        page = await shows(settings, lambda page: page("outbox_dead_letters", **REACT) == 0)
        page = await scrape(settings.metrics.port)
    assert page("outbox_open_deliveries", **REACT, state="dispatched") == 0
    assert page("outbox_oldest_due_seconds", queue="ledger") == 0
    assert page("outbox_queue_paused", queue="ledger") == page("outbox_queue_paused", queue="*") == 0


async def test_a_limited_queue_shows(ledger: Ledger, settings: Settings) -> None:
    await ledger.connection.execute(
        "INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('ledger', 1, 'me')"
    )
    async with watched(settings):
        await shows(settings, lambda page: page("outbox_queue_limited", queue="ledger") == 1)
        await ledger.connection.execute("DELETE FROM limited_queue")
        await shows(settings, lambda page: page("outbox_queue_limited", queue="ledger") == 0)


async def test_what_waits_behind_a_dead_letter_of_its_lane_shows(ledger: Ledger, settings: Settings) -> None:
    bystander = await ledger.happen()
    await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('*', 'me')")
    await ledger.connection.execute(DEAD_LETTER, bystander)
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_dead_letters", **REACT) == 1)
        assert page("outbox_stranded_lanes") == 0
        assert page("outbox_blocked_lanes", **REACT) is page("outbox_parked_deliveries", **REACT) is None
        await ledger.connection.execute(
            "UPDATE dead_letter SET lane = 'a:1', position = 0, blocks = true, died_at = now() - interval '90 s'"
        )
        await ledger.connection.execute(IN_LANE, "a:1")
        await ledger.connection.execute(IN_LANE, "a:2")
        page = await shows(settings, lambda page: page("outbox_blocked_deliveries", **REACT) == 1)
        assert page("outbox_blocked_lanes", **REACT) == 1
        assert 90 <= (page("outbox_blocked_seconds", **REACT) or 0) < 400
        assert page("outbox_parked_deliveries", **REACT) == 1
        await ledger.connection.execute("UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = 'a:2'")
        await ledger.connection.execute("UPDATE dead_letter SET resolution = 'discarded', resolved_at = now()")
        page = await shows(settings, lambda page: page("outbox_stranded_lanes") == 1)
    assert page("outbox_blocked_lanes", **REACT) == page("outbox_blocked_deliveries", **REACT) == 0
    assert page("outbox_blocked_seconds", **REACT) == 0
    assert page("outbox_parked_deliveries", **REACT) == 1


async def test_a_queue_that_takes_nothing_counts_as_refused(ledger: Ledger, settings: Settings) -> None:
    async with redis.asyncio.Redis.from_url(settings.broker.redis_url) as client:
        await client.set(f"{settings.broker.namespace}:ledger", "no list")
        async with watched(settings):
            _, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
            page = await shows(settings, lambda page: page("outbox_relay_refused_total", queue="ledger"))
            await until(lambda: is_dispatched(ledger, fine))
            page = await shows(settings, lambda page: page("outbox_relay_handed_over_total", queue="other") == 1)
    assert page("outbox_relay_refused_total", queue="other") == 0
    assert page("outbox_relay_handed_over_total", queue="ledger") is None
    assert page("outbox_up", system="broker") == 1


async def is_dispatched(ledger: Ledger, id_: Any) -> bool:
    return await ledger.state(id_) == "dispatched"


async def test_purged_rows_are_counted(ledger: Ledger, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.process.purge.EVERY", 0.1)
    settings.outbox.keep_completed = 0
    (id_,) = await ledger.publish(delay=timedelta(hours=1))
    async with watched(settings) as relay:
        purger = asyncio.create_task(purge_regularly(settings, relay.tally))
        page = await shows(settings, lambda page: page("outbox_purged_rows_total", table="outbox_message") == 0)
        await ledger.connection.execute(
            "UPDATE outbox_message SET state = 'completed', completed_at = now() - interval '1 h' WHERE id = $1", id_
        )
        page = await shows(settings, lambda page: page("outbox_purged_rows_total", table="outbox_message"))
        purger.cancel()
    assert page("outbox_purged_rows_total", table="outbox_message") == 1
    assert page("outbox_purged_rows_total", table="idempotency_key") == 0


async def test_what_workers_have_run_comes_from_the_ledger(ledger: Ledger, settings: Settings) -> None:
    done, failed = Runs(2), Runs(1)
    for seconds in (0.02, 0.2):
        done.run.add(seconds)
        done.start.add(seconds)
        done.effect.add(2 * seconds)
    failed.run.add(40)
    keys = {Key("ledger", "ledger.react", "completed"): done, Key("ledger", "ledger.react", "failed"): failed}
    await statistics.add(ledger.connection, keys)
    worker = ProcessIdentity(uuid4(), "worker", "a-host", 17, ["ledger", "other"], 8, "1")
    await statistics.report(ledger.connection, worker, statistics.ALIVE, statistics.Vitals(1, 0.7, 3))
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_worker_processes", queue="ledger"))
    assert page("outbox_worker_processes", queue="other") == 1
    assert page("event_loop_lag_seconds", process="worker a-host 17") == 0.7
    assert page("db_pool_timeouts_total", process="worker a-host 17") == 3
    assert f"relay {socket.gethostname()} {os.getpid()}" in page.values("event_loop_lag_seconds", "process")
    assert page("outbox_runs_total", **REACT, outcome="completed") == 2
    assert page("outbox_runs_total", **REACT, outcome="failed") == 1
    assert page("outbox_runs_total", **REACT, outcome="dead") == 0
    assert page("outbox_run_duration_seconds_count", **REACT) == 3
    assert page("outbox_run_duration_seconds_sum", **REACT) == pytest.approx(40.22)
    assert page("outbox_run_duration_seconds_bucket", **REACT, le="0.025") == 1
    assert page("outbox_run_duration_seconds_bucket", **REACT, le="30.0") == 2
    assert page("outbox_start_latency_seconds_count", **REACT) == 2
    assert page("outbox_effect_latency_seconds_sum", **REACT) == pytest.approx(0.44)


async def test_what_has_not_happened_yet_is_there_as_zero(ledger: Ledger, settings: Settings) -> None:
    await ledger.publish(delay=timedelta(hours=1))
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_runs_total", **REACT, outcome="dead") == 0)
    assert page("outbox_effect_latency_seconds_count", **REACT) == 0
    assert page("outbox_purged_rows_total", table="outbox_message") == 0


async def test_every_sample_has_the_labels_of_the_table_and_no_others(ledger: Ledger, settings: Settings) -> None:
    await ledger.publish()
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_relay_handed_over_total", queue="ledger"))
    table = {each.name: set(each.labels.split()) for each in METRICS}
    for name, labels in page:
        base = name if name in table else name.rpartition("_")[0]
        assert labels.keys() - {"le"} == table[base], name


@pytest.mark.slow
async def test_scrapes_beside_each_other_ask_once_and_wait_for_no_lock(
    ledger: Ledger, settings: Settings, connect: Connect
) -> None:
    async with watched(settings):
        blocker = await connect()
        transaction = blocker.transaction()
        await transaction.start()
        await blocker.execute("LOCK TABLE dead_letter IN ACCESS EXCLUSIVE MODE")
        before = await scrape(settings.metrics.port)
        began = time.monotonic()
        for _ in range(3):
            pages = await asyncio.gather(*(scrape(settings.metrics.port) for _ in range(8)))
        assert time.monotonic() - began < 20
        asking = await ledger.connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name ~ '^outbox-metrics' AND query ~ 'dead_letter'"
            " AND state = 'active' AND datname = current_database()"
        )
        assert asking == 1
        old = pages[0]("outbox_collected_timestamp_seconds", part="counts")
        assert old is not None
        assert old == before("outbox_collected_timestamp_seconds", part="counts")
        fresh = pages[0]("outbox_collected_timestamp_seconds", part="ledger")
        assert fresh is not None
        assert fresh > old
        await transaction.rollback()
        await shows(settings, lambda page: (page("outbox_collected_timestamp_seconds", part="counts") or 0) > old)


@pytest.mark.slow
async def test_what_costs_more_is_kept_for_longer() -> None:
    async def ask() -> list[Sample]:
        await asyncio.sleep(0.1)
        return []

    part = metrics._Part("counts", ask, kept=0.5)
    asked = part.begin()
    assert asked is not None
    assert part.begin() is None
    await asked
    began = time.monotonic()
    await until(lambda: part.begin() is not None, what="the next time")
    assert time.monotonic() - began >= 1.9
    assert part.task is not None
    await part.task


async def test_without_a_broker_the_old_numbers_stand(ledger: Ledger, settings: Settings, own_valkey: Valkey) -> None:
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    async with watched(settings):
        await ledger.publish()
        page = await shows(settings, lambda page: page("outbox_broker_queue_messages", queue="ledger"))
        collected = page("outbox_collected_timestamp_seconds", part="broker")
        own_valkey.stop()
        page = await shows(settings, lambda page: page("outbox_up", system="broker") == 0)
        began = time.monotonic()
        page = await scrape(settings.metrics.port)
        assert time.monotonic() - began < 10
        assert page("outbox_broker_queue_messages", queue="ledger") == 1
        assert (page("outbox_collected_timestamp_seconds", part="broker") or 0) - (collected or 0) < 60
        assert page("outbox_up", system="postgresql") == 1
        own_valkey.restart()
        await shows(settings, lambda page: page("outbox_up", system="broker") == 1)


@pytest.mark.slow
async def test_without_postgresql_the_old_numbers_stand(settings: Settings, own_postgres: Postgres) -> None:
    settings.database.url = type(settings.database.url)(own_postgres.url("service"))
    connection = await asyncpg.connect(settings.database.dsn)
    await connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('mine', 'me')")
    await connection.close()
    async with watched(settings):
        page = await shows(settings, lambda page: page("outbox_queue_paused", queue="mine"))
        for stop in ("immediate", "freeze"):
            if stop == "immediate":
                own_postgres.stop("immediate")
            else:
                stopped = [psutil.Process(own_postgres.pid), *psutil.Process(own_postgres.pid).children()]
                for each in stopped:
                    each.suspend()
            page = await shows(settings, lambda page: page("outbox_up", system="postgresql") == 0)
            collected = page("outbox_collected_timestamp_seconds", part="ledger")
            began = time.monotonic()
            page = await scrape(settings.metrics.port)
            assert time.monotonic() - began < 10
            assert page("outbox_queue_paused", queue="mine") == 1
            assert page("outbox_collected_timestamp_seconds", part="ledger") == collected
            if stop == "immediate":
                own_postgres.restart()
            else:
                for each in stopped:
                    each.resume()
            page = await shows(settings, lambda page: page("outbox_up", system="postgresql") == 1)
            assert (page("outbox_collected_timestamp_seconds", part="ledger") or 0) > (collected or 0)


def listens(pid: int) -> bool:
    return any(each.status == psutil.CONN_LISTEN for each in psutil.Process(pid).net_connections("inet"))


@pytest.mark.slow
async def test_a_relay_listens_where_it_is_told_to_and_else_nowhere(processes: Processes, settings: Settings) -> None:
    silent = await processes.relay()
    settings.metrics.port = free_port()
    telling = await processes.relay(METRICS__PORT=str(settings.metrics.port))
    await shows(settings, lambda page: page("outbox_relays") == 2)
    assert listens(telling.process.pid)
    assert not listens(silent.process.pid)
    assert await telling.stop() == 0
