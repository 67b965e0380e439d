"""`outbox status` counts what is open, stays cheap, and says which of PostgreSQL, broker and relay is missing."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import asyncpg
import pytest
import redis

from service.ledger import counting
from tests.waiting import until_sync

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

    from service.dev.valkey import Valkey
    from tests.proof.cli.conftest import Outbox, Rows

    Start = Callable[[Sequence[str]], subprocess.Popen[str]]


@pytest.fixture
def busy(rows: Rows) -> Rows:
    """A ledger with something in each state."""
    rows.message(3)
    rows.message(2, attempts="1", errors="'[{}]'", due_at="now() + interval '1 hour'")
    rows.message(4, state="'dispatched'", dispatches="1", due_at="now() + interval '1 minute'")
    rows.message(5, state="'running'", attempts="1", dispatches="1", due_at="now() + interval '1 minute'")
    rows.message(6, state="'completed'", completed_at="now()")
    rows.message(1, consumer="'orders.send_confirmation'", queue="'email'", due_at="now() - interval '400 s'")
    rows.dead_letter(7)
    rows.dead_letter(1, resolution="'discarded'", resolved_at="now()")
    return rows


def test_status_counts_per_queue_and_consumer(outbox: Outbox, busy: Rows) -> None:
    ran = outbox("status")
    assert ran.code == 0, ran.err
    assert [each.split() for each in ran.out.splitlines() if each.startswith(("QUEUE", "  orders"))] == [
        ["QUEUE,", "CONSUMER", "PENDING", "DISPATCHED", "RUNNING", "FAILED", "DEAD", "DONE", "OLDEST"],
        ["orders.send_confirmation", "1", "0", "0", "0", "7", "0", "7m"],
        ["orders.reserve_stock", "5", "4", "5", "2", "0", "6", ran.out.split()[-6]],
    ]
    assert "7 dead: outbox dead-letters list" in ran.out


def test_status_is_80_columns_wide_whatever_the_numbers_and_names(outbox: Outbox, rows: Rows) -> None:
    rows.message(2_000, consumer="'billing.' || repeat('x', 100)", queue="repeat('q', 90)")
    rows.dead_letter(1_500)
    lines = outbox("status").out.splitlines()
    assert len(lines) > 8
    assert max(map(len, lines)) <= 80


def test_status_as_json(outbox: Outbox, busy: Rows) -> None:
    found = outbox("status", "--json").json
    assert found["postgresql"] == {"ok": True, "problem": None}
    assert found["broker"]["ok"]
    assert found["totals"].items() >= {"pending": 6, "dispatched": 4, "running": 5, "failed": 2, "dead": 7}.items()
    assert 400 <= found["totals"]["oldest"] < 500
    assert found["completed"] == {"count": 6, "estimated": False}
    assert {each["queue"]: each["dead"] for each in found["consumers"]} == {"email": 7, "stock": 0}


def test_an_empty_outbox(outbox: Outbox) -> None:
    ran = outbox("status")
    assert (ran.code, "Nothing is open." in ran.out) == (0, True)
    assert outbox("status", "--fail-if", "pending>0,oldest>0s,dead>0").code == 0


def test_fail_if(outbox: Outbox, busy: Rows) -> None:
    true = ["dead>0", "dead>=7", "dead<=7", "pending=6", "dead>100,oldest>300s", "oldest>5m", "relays<1"]
    false = ["dead>7", "dead<7", "oldest > 10m", "paused>0", "dead>100,unclaimed>0"]
    for condition in true + false:
        ran = outbox("status", "--json", "--fail-if", condition)
        assert (ran.code, len(ran.err.splitlines())) == ((1, 1) if condition in true else (0, 0)), condition
        assert ran.json["totals"]["dead"] == 7


def test_a_condition_that_makes_no_sense_is_refused(outbox: Outbox) -> None:
    for condition in ("", "dead", "dead>x", "daed>0", "dead>1s", "dead>0,,", "dead>0 or oldest>1s"):
        ran = outbox("status", "--fail-if", condition)
        assert (ran.code, ran.out) == (2, ""), condition
        assert "expected 'dead>0' or 'oldest>300s'" in ran.err


def test_paused_queues_are_marked(outbox: Outbox, busy: Rows, rows: Rows) -> None:
    outbox("queues", "pause", "email", "--by", "ann", "--why", "mail server is down")
    rows.sql("UPDATE paused_queue SET paused_at = now() - interval '50 hours'")
    out = outbox("status").out
    assert "email (paused)\n" in out
    assert "\nstock\n" in out
    assert "queue email is paused for 2d by ann: mail server is down" in out
    outbox("queues", "pause", "--all")
    assert "stock (paused)\n" in outbox("status").out


@pytest.mark.usefixtures("busy")
def test_limited_queues_are_marked(outbox: Outbox) -> None:
    outbox("queues", "limit", "email", "--concurrency", "4", "--by", "ann", "--why", "the contract")
    ran = outbox("status")
    assert "email (limited)\n" in ran.out
    assert "\nstock\n" in ran.out
    assert "queue email is limited to 4 at once by ann: the contract" in ran.out
    [limited] = outbox("status", "--json").json["limited"]
    assert (limited["queue"], limited["concurrency"], limited["per_second"]) == ("email", 4, None)


def test_deliveries_that_no_worker_takes_are_told_of(outbox: Outbox, rows: Rows) -> None:
    rows.message(2, state="'dispatched'", dispatches="3", due_at="now() + interval '1 minute'")
    ran = outbox("status", "--fail-if", "unclaimed>0")
    assert ran.code == 1
    assert "orders.reserve_stock: 2 handed over repeatedly and not taken; is a worker on stock?" in ran.out


async def test_a_connected_relay_is_seen(start: Start, rows: Rows, database_url: str) -> None:
    relay = await asyncpg.connect(database_url, server_settings={"application_name": "outbox-relay"})
    process = start(["status", "--json"])
    out, err = process.communicate(timeout=60)
    await relay.close()
    assert json.loads(out)["relays"] == 1, err


def test_a_missing_broker_is_named_and_the_rest_is_shown(
    outbox: Outbox, busy: Rows, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER__URL", own_valkey.url)
    assert outbox("status").code == 0
    own_valkey.kill()
    ran = outbox("status")
    assert ran.code == 3
    assert "PostgreSQL  ok" in ran.out
    assert "broker      DOWN: cannot use the broker at" in ran.out
    assert "orders.reserve_stock" in ran.out
    assert outbox("status", "--fail-if", "dead>0").code == 1
    assert outbox("status", "--fail-if", "dead>100").code == 3


def test_a_missing_postgresql_is_named_and_the_broker_is_shown(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://ann:secret@127.0.0.1:1/shop")
    ran = outbox("status", "--fail-if", "dead>0")
    assert ran.code == 3
    assert "PostgreSQL  DOWN: cannot reach PostgreSQL at 127.0.0.1:1/shop" in ran.out
    assert "broker      ok" in ran.out
    assert "secret" not in ran.out + ran.err
    found = outbox("status", "--json").json
    assert (found["postgresql"]["ok"], found["broker"]["ok"]) == (False, True)


def test_both_missing_are_both_named(outbox: Outbox, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://ann:secret@127.0.0.1:1/shop")
    monkeypatch.setenv("BROKER__URL", own_valkey.url)
    own_valkey.kill()
    ran = outbox("status")
    assert ran.code == 3
    assert "PostgreSQL  DOWN: cannot reach PostgreSQL at 127.0.0.1:1/shop" in ran.out
    assert "broker      DOWN: cannot use the broker at" in ran.out
    found = outbox("status", "--json").json
    assert (found["postgresql"]["ok"], found["broker"]["ok"], found["queues"]) == (False, False, [])


def test_a_full_and_a_refused_queue_are_named(
    outbox: Outbox, rows: Rows, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX__HIGH_WATER_MARK", "2")
    rows.message(3)
    rows.message(1, queue="'email'")
    rows.message(1, queue="'audit'")
    rows.message(1, queue="'done'", state="'completed'", completed_at="now()")
    name = environment["BROKER__NAMESPACE"]
    with redis.Redis.from_url(environment["BROKER__URL"].replace("valkey://", "redis://")) as client:
        client.rpush(f"{name}:stock", "one", "two")
        client.set(f"{name}:email", "not a list")
        client.rpush(f"{name}:audit", "one")
    ran = outbox("status")
    assert ran.code == 0, ran.err
    assert "broker      ok" in ran.out
    assert {"stock (full)", "email (refused)", "audit"} <= set(ran.out.splitlines())
    assert "queue stock is full: 2 wait in the broker" in ran.out
    assert "queue email is refused by the broker: WRONGTYPE" in ran.out
    queues = outbox("status", "--json").json["queues"]
    assert [(each["queue"], each["state"], each["waiting"]) for each in queues] == [
        ("audit", "ok", 1),
        ("email", "refused", None),
        ("stock", "full", 2),
    ]
    assert "WRONGTYPE" in queues[1]["problem"]


def test_a_queue_whose_bodies_are_refused_is_named(outbox: Outbox, rows: Rows, environment: dict[str, str]) -> None:
    rows.message(1)
    with redis.Redis.from_url(environment["BROKER__URL"].replace("valkey://", "redis://")) as client:
        client.set(f"{environment['BROKER__NAMESPACE']}:stock.msgs", "not a hash")
    assert "stock (refused)" in outbox("status").out.splitlines()


@pytest.mark.slow
def test_a_broker_that_stands_still_is_down_within_its_time(
    outbox: Outbox, rows: Rows, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKER__URL", own_valkey.url)
    rows.message(1)
    assert own_valkey.pid
    os.kill(own_valkey.pid, signal.SIGSTOP)
    try:
        ran = outbox("status")
    finally:
        os.kill(own_valkey.pid, signal.SIGCONT)
    assert ran.code == 3
    assert "does not answer within 3 s" in ran.out
    assert "orders.reserve_stock" in ran.out


def test_completed_rows_of_a_large_table_are_estimated(
    outbox: Outbox, busy: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "SMALL_TABLE", 0)
    assert "completed: unknown, never analyzed" in outbox("status").out
    busy.message(1_000, state="'completed'", completed_at="now()")
    busy.sql("ANALYZE outbox_message")
    ran = outbox("status")
    assert "completed: ~1,006 (--exact counts them)" in ran.out
    assert [line.split()[6] for line in ran.out.splitlines() if line.startswith("  orders")] == ["-", "-"]
    assert outbox("status", "--exact", "--json").json["completed"] == {"count": 1_006, "estimated": False}


async def test_the_open_rows_are_counted_without_reading_the_completed_ones(rows: Rows, database_url: str) -> None:
    rows.message(2_000, state="'completed'", completed_at="now()")
    rows.message(2)
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("SET enable_seqscan = off")
        plan = await connection.fetchval("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + counting._OPEN)
    finally:
        await connection.close()
    assert "ix_outbox_message_due" in plan
    assert json.loads(plan)[0]["Plan"]["Shared Hit Blocks"] < 40


def test_watch_goes_on_until_interrupted(start: Start, rows: Rows) -> None:
    rows.message()
    process = start(["status", "--watch", "--interval", "0.2", "--json"])
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    assert first["totals"]["pending"] == 1
    rows.sql("DELETE FROM outbox_message")
    until_sync(lambda: json.loads(process.stdout.readline())["totals"]["pending"] == 0)  # type: ignore[union-attr]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_watch_ends_when_a_condition_comes_true(start: Start, rows: Rows) -> None:
    process = start(["status", "--watch", "--interval", "0.2", "--json", "--fail-if", "dead>0"])
    assert process.stdout is not None
    process.stdout.readline()
    rows.dead_letter()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "outbox: dead is 1 (fails if dead>0)\n")
