"""Queues are paused and limited by a row that every relay reads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.waiting import until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Sequence

    from tests.proof.cli.conftest import Outbox, Rows

    Start = Callable[[Sequence[str]], subprocess.Popen[str]]

_LIMITED = "SELECT queue, concurrency, per_second, burst, limited_by, why FROM limited_queue"
_PAUSED = "SELECT queue, paused_by, why FROM paused_queue ORDER BY queue"


def test_pause_and_resume(outbox: Outbox, rows: Rows) -> None:
    ran = outbox("queues", "pause", "email", "--by", "ann", "--why", "mail server is down")
    assert (ran.code, ran.out) == (0, "Paused queue email. To go on: outbox queues resume email\n")
    assert rows.sql(_PAUSED) == "email|ann|mail server is down"
    again = outbox("queues", "pause", "email", "--by", "bob")
    assert (again.code, "was paused already" in again.out) == (0, True)
    assert rows.sql(_PAUSED) == "email|ann|mail server is down"
    ran = outbox("queues", "resume", "email")
    assert (ran.code, ran.out) == (0, "Resumed queue email.\n")
    assert rows.sql(_PAUSED) == ""


def test_words_in_bytes_that_are_no_text_are_taken(outbox: Outbox, rows: Rows) -> None:
    assert outbox("queues", "pause", "email", "--by", "j\udcfcrgen", "--why", "gepr\udcfcft").code == 0
    assert rows.sql(_PAUSED) == "email|j\ufffdrgen|gepr\ufffdft"


def test_pausing_all_does_not_forget_the_queues_paused_by_name(outbox: Outbox, rows: Rows) -> None:
    outbox("queues", "pause", "email", "--by", "ann")
    outbox("queues", "pause", "--all", "--by", "ann")
    assert rows.sql(_PAUSED) == "*|ann|\nemail|ann|"
    ran = outbox("queues", "resume", "--all")
    assert (ran.out, ran.err) == ("Resumed all queues.\n", "Still paused by name: email\n")
    assert rows.sql(_PAUSED) == "email|ann|"


def test_resuming_one_while_all_are_paused_says_so(outbox: Outbox) -> None:
    outbox("queues", "pause", "email")
    outbox("queues", "pause", "--all")
    assert "All queues are still paused" in outbox("queues", "resume", "email").err
    assert outbox("queues", "pause", "email", "--json").json == {"queue": "email", "paused": True, "changed": True}


@pytest.mark.parametrize("arguments", [("stok",), ("--all",)])
def test_resuming_what_is_not_paused_is_a_mistake(outbox: Outbox, arguments: list[str]) -> None:
    outbox("queues", "pause", "stock")
    ran = outbox("queues", "resume", *arguments)
    assert (ran.code, ran.out) == (4, "")
    assert "not paused" in ran.err


@pytest.mark.parametrize("arguments", [(), ("email", "--all"), ("*",), ("e mail",), ("",)])
def test_a_name_that_makes_no_sense_is_refused(outbox: Outbox, rows: Rows, arguments: list[str]) -> None:
    ran = outbox("queues", "pause", *arguments)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert rows.sql(_PAUSED) == ""


def test_list_shows_what_each_queue_holds(outbox: Outbox, rows: Rows) -> None:
    assert outbox("queues", "list").out == "No queue has anything open.\n"
    rows.message(3)
    rows.message(1, due_at="now() + interval '1 hour'")
    rows.message(1, queue="'done'", state="'completed'")
    rows.dead_letter(2)
    outbox("queues", "pause", "email", "--by", "ann", "--why", "a reason that is too long for a line of " + "x" * 60)
    ran = outbox("queues", "list")
    assert [line.split()[:4] for line in ran.out.splitlines()] == [
        ["QUEUE", "OPEN", "DUE", "DEAD"],
        ["email", "0", "0", "2"],
        ["stock", "4", "3", "0"],
    ]
    assert max(map(len, ran.out.splitlines())) <= 80
    listed = outbox("queues", "list", "--json").json["queues"]
    assert listed[0]["paused"]["by"] == "ann"
    assert listed[1] == {"queue": "stock", "open": 4, "due": 3, "dead": 0, "limit": None, "paused": None}


def test_limit_and_unlimit(outbox: Outbox, rows: Rows) -> None:
    ran = outbox(
        "queues", "limit", "partner", "--concurrency", "4", "--rate", "10/s", "--by", "ann", "--why", "contract"
    )
    said = "Limited queue partner to 4 at once and 10/s, 1 at a time. To undo it: outbox queues unlimit partner\n"
    assert (ran.code, ran.out) == (0, said)
    assert rows.sql(_LIMITED) == "partner|4|10|1|ann|contract"
    [listed] = outbox("queues", "list", "--json").json["queues"]
    assert (listed["limit"]["per_second"], listed["limit"]["by"]) == (10, "ann")
    assert "4 at once" in outbox("queues", "list").out
    ran = outbox("queues", "limit", "partner", "--rate", "600/m", "--burst", "5", "--by", "bob", "--json")
    assert ran.json == {"queue": "partner", "concurrency": None, "per_second": 10, "burst": 5}
    assert rows.sql(_LIMITED) == "partner||10|5|bob|"
    assert outbox("queues", "unlimit", "partner").out == "Queue partner has no limit any more.\n"
    ran = outbox("queues", "unlimit", "partner")
    assert (ran.code, "has no limit" in ran.err) == (4, True)
    assert rows.sql(_LIMITED) == ""
    acts = outbox("audit", "--json").json["acts"]
    assert [(each["kind"], each["about"]["queue"]) for each in acts] == [
        ("unlimit", "partner"), ("limit", "partner"), ("limit", "partner"),
    ]  # fmt: skip
    assert acts[2]["about"] == {"queue": "partner", "concurrency": 4, "per_second": 10, "burst": 1}


@pytest.mark.parametrize(
    ("rate", "said"),
    [("10/s", "10/s, 1"), ("25/s", "25/s, 2"), ("100/m", "100/m, 1"), ("5000/h", "5,000/h, 1"), ("2.5/s", "150/m, 1")],
)
def test_a_rate_is_said_as_it_was_given(outbox: Outbox, rate: str, said: str) -> None:
    assert f"to {said} at a time." in outbox("queues", "limit", "partner", "--rate", rate).out


@pytest.mark.parametrize(
    "arguments",
    [
        ("partner",),
        ("e mail", "--concurrency", "1"),
        ("*", "--concurrency", "1"),
        ("partner", "--concurrency", "0"),
        ("partner", "--concurrency", "10001"),
        ("partner", "--concurrency", "1", "--burst", "2"),
        ("partner", "--rate", "10/s", "--burst", "0"),
        ("partner", "--rate", "10"),
        ("partner", "--rate", "0/s"),
        ("partner", "--rate", "99999/s"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(outbox: Outbox, rows: Rows, arguments: list[str]) -> None:
    ran = outbox("queues", "limit", *arguments)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert rows.sql(_LIMITED) == ""


@pytest.mark.slow
async def test_a_change_wakes_a_sleeping_relay(start: Start, database_url: str) -> None:
    sleeping = await asyncpg.connect(database_url)
    woken = asyncio.Event()
    try:
        await sleeping.add_listener("outbox", lambda *_: woken.set())
        await sleeping.execute("SELECT pg_advisory_lock(outbox_gate())")
        for verb in ("pause", "resume", "limit --concurrency 2", "unlimit"):
            process = start(["queues", *verb.split(), "email"])
            await until(woken.is_set)
            woken.clear()
            assert process.communicate(timeout=60)[1] == ""
    finally:
        await sleeping.close()
