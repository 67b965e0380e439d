"""Dead letters are found, shown, replayed once under their old id, and discarded."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import asyncpg
import pytest

from service.ledger.replaying import resolve
from tests.proof.cli.conftest import error, json_literal
from tests.waiting import until, until_sync

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from service.database.driver import Connection
    from service.ledger.replaying import Action
    from tests.proof.cli.conftest import Outbox, Rows

    Start = Callable[[Sequence[str]], subprocess.Popen[str]]

_OPEN = "SELECT count(*) FROM dead_letter WHERE resolution IS NULL"
_MESSAGES = "SELECT count(*) FROM outbox_message"
_WAITING = """
SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database()
"""


@pytest.fixture
async def two_connections(database_url: str) -> AsyncIterator[tuple[Connection, Connection]]:
    first, second = await asyncpg.connect(database_url), await asyncpg.connect(database_url)
    yield first, second
    first.terminate()
    second.terminate()


def test_list_shows_the_latest_first_within_80_columns(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(died_at="now() - interval '50 hours'")
    rows.dead_letter(consumer="'billing.' || repeat('very_long_', 11)", reason="repeat('no way ', 60)")
    ran = outbox("dead-letters", "list")
    assert ran.code == 0
    header, second, first = ran.out.splitlines()
    assert header.split() == ["ID", "DIED", "CONSUMER", "TRIES", "REASON"]
    assert second.split()[0] == "2"
    assert first.split()[:4] == ["1", "2d", "orders.send_confirmation", "3"]
    assert "failed 3 times; MailError" in first
    assert max(map(len, ran.out.splitlines())) <= 80


def test_list_keeps_what_could_steer_the_terminal_away(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(reason=r"E'first\nsecond\x1b[2J'", errors="'[]'")
    ran = outbox("dead-letters", "list")
    assert len(ran.out.splitlines()) == 2
    assert "\x1b" not in ran.out + outbox("dead-letters", "show", "1").out


_PEAK = """
import atexit, sys, tracemalloc
from relay.cli.app import main
tracemalloc.start()
atexit.register(lambda: print(tracemalloc.get_traced_memory()[1], file=sys.stderr))
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_long_list_is_never_in_memory_as_a_whole(rows: Rows, environment: dict[str, str], form: list[str]) -> None:
    rows.dead_letter(3_000, payload="jsonb_build_object('note', repeat('x', 40000))")
    command = [sys.executable, "-c", _PEAK, "dead-letters", "list", "--limit", "100000", *form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["dead_letters"] if form else done.stdout.splitlines()[1:]) == 3_000
    assert int(done.stderr) < 60e6, "of 120 MB"


def test_an_empty_list_says_so(outbox: Outbox) -> None:
    ran = outbox("dead-letters", "list")
    assert (ran.code, ran.out) == (0, "There are no open dead letters.\n")


def test_list_says_when_it_is_cut_off(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(3)
    ran = outbox("dead-letters", "list", "--limit", "2", "--json")
    assert ran.json["total"] == 3
    assert [each["id"] for each in ran.json["dead_letters"]] == [3, 2]
    assert "The latest 2 of 3" in outbox("dead-letters", "list", "--limit", "2").err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--consumer", "billing.charge"),
        ("--event-type", "order.charged"),
        ("--queue", "money"),
        ("--since", "5m"),
        ("--since", "2026-03-01T00:00:00+00:00"),
        ("--error", "CARD refused"),
        ("--error", "CardError: card"),
        ("--error", "gave up"),
    ],
)
def test_filters_find_only_what_matches(outbox: Outbox, rows: Rows, option: str, value: str) -> None:
    rows.dead_letter(died_at="'2026-02-01T00:00:00Z'")
    rows.dead_letter(
        consumer="'billing.charge'",
        event_type="'order.charged'",
        queue="'money'",
        errors=json_literal([error("Timeout", "no answer"), error("CardError", 'card refused by "bank"')]),
        reason="'Gave up'",
    )
    assert [each["id"] for each in outbox("dead-letters", "list", option, value, "--json").json["dead_letters"]] == [2]
    assert outbox("dead-letters", "replay", option, value, "--yes").out == "Replayed dead letter 2.\n"


def test_until_and_state(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(died_at="'2026-02-01T00:00:00Z'")
    rows.dead_letter()
    listed = outbox("dead-letters", "list", "--until", "1h", "--json").json["dead_letters"]
    assert [each["id"] for each in listed] == [1]
    outbox("dead-letters", "discard", "1")
    for state, ids in (("open", [2]), ("discarded", [1]), ("replayed", []), ("any", [2, 1])):
        listed = outbox("dead-letters", "list", "--state", state, "--json").json["dead_letters"]
        assert [each["id"] for each in listed] == ids


def test_show_prints_everything_and_a_replay_command_that_works(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter()
    ran = outbox("dead-letters", "show", "1")
    assert ran.code == 0
    for text in (str(delivery_id), "550 no such user", "orders/consumers.py:30 send", '{"order_id": "0193"}', "abc"):
        assert text in ran.out
    command = re.search(r"^ *outbox (dead-letters replay .+)$", ran.out, re.MULTILINE)
    assert command is not None
    assert outbox(*command[1].split()).code == 0
    assert rows.sql("SELECT resolution FROM dead_letter") == "replayed"


def test_show_takes_a_delivery_id_and_gives_json(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter()
    shown = outbox("dead-letters", "show", str(delivery_id), "--json").json
    assert shown["message_id"] == str(delivery_id)
    assert shown["errors"][0]["type"] == "MailError"
    assert shown["replay"] == "outbox dead-letters replay 1"


def test_a_replay_says_for_the_statistics_how_long_after_its_event_it_came_due(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(created_at="now() - interval '1 hour'")
    assert outbox("dead-letters", "replay", "1").code == 0
    assert 3_600 <= float(rows.sql("SELECT headers ->> 'due_after' FROM outbox_message")) < 3_900


def test_replay_writes_the_row_back_under_its_id_with_a_fresh_budget(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter()
    ran = outbox("dead-letters", "replay", "1", "--by", "ann", "--why", "mail server is back")
    assert (ran.code, ran.out) == (0, "Replayed dead letter 1.\n")
    row = json.loads(rows.sql("SELECT to_jsonb(m) FROM outbox_message m"))
    kept = {"id": str(delivery_id), "event_type": "order.confirmed", "version": 1, "queue": "email"}
    fresh = {"state": "pending", "attempts": 0, "dispatches": 0, "errors": [], "claim_token": None, "started_at": None}
    assert row == row | kept | fresh
    assert row["payload"] == {"order_id": "0193"}
    assert row["headers"]["correlation_id"] == "abc"
    assert row["created_at"].startswith("2026-01-02T03:04:05")
    assert rows.sql("SELECT clock_timestamp() - due_at BETWEEN '0 s' AND '20 s' FROM outbox_message") == "t"
    record = rows.sql("SELECT resolution, resolved_by, resolved_why, resolved_at > died_at, attempts FROM dead_letter")
    assert record == "replayed|ann|mail server is back|t|3"
    assert "replayed by ann (database role postgres) at" in outbox("dead-letters", "show", "1").out


def test_the_record_names_who_ran_the_command(outbox: Outbox, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "berta")
    rows.dead_letter()
    outbox("dead-letters", "discard", "1")
    assert rows.sql("SELECT resolved_by FROM dead_letter").startswith("berta@")


def test_what_was_replayed_is_not_replayed_again(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(2)
    outbox("dead-letters", "replay", "1", "--by", "ann")
    rows.sql("UPDATE outbox_message SET state = 'completed', completed_at = now()")
    ran = outbox("dead-letters", "replay", "1", "2", "--yes")
    assert ran.code == 4
    assert "dead letter 1 was replayed by ann at 20" in ran.err
    assert ran.out == "Replayed dead letter 2.\n"
    assert rows.sql("SELECT state, count(*) FROM outbox_message GROUP BY state ORDER BY 1") == "completed|1\npending|1"


def test_a_delivery_that_died_twice_is_replayed_by_its_delivery_id(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter()
    outbox("dead-letters", "replay", "1")
    rows.sql("DELETE FROM outbox_message")
    rows.sql(
        "INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers,"
        " attempts, dispatches, created_at, errors, reason) SELECT message_id, event_id, event_type, version,"
        " consumer, queue, payload, headers, attempts, dispatches, created_at, errors, 'again' FROM dead_letter"
    )
    ran = outbox("dead-letters", "replay", str(delivery_id))
    assert (ran.code, ran.out) == (0, "Replayed dead letter 2.\n")


def test_the_record_of_a_replay_cannot_be_overwritten(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter()
    outbox("dead-letters", "replay", "1", "--by", "ann")
    for verb in ("replay", "discard"):
        assert outbox("dead-letters", verb, "1", "--by", "bob").code == 4
    assert rows.sql("SELECT resolution, resolved_by FROM dead_letter") == "replayed|ann"


def test_nothing_is_lost_when_the_row_is_in_the_outbox_already(outbox: Outbox, rows: Rows) -> None:
    ids = rows.dead_letter(2)
    rows.message(event_id=ids[0], number=0, payload="'{}'")
    ran = outbox("dead-letters", "replay", "--all", "--yes")
    assert ran.code == 1
    assert "dead letter 1 stays open" in ran.err
    assert ran.out == "Replayed dead letter 2.\n"
    assert rows.sql("SELECT id, resolution FROM dead_letter ORDER BY id") == "1|\n2|replayed"
    assert rows.sql("SELECT count(*), count(*) FILTER (WHERE payload = '{}') FROM outbox_message") == "2|1"


def test_more_than_one_is_asked_for(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(2)
    for answer in ("", "n\n", "\n"):
        ran = outbox("dead-letters", "replay", "--all", answer=answer)
        assert (ran.code, ran.out) == (1, "")
        assert "Replay 2 dead letters? [y/N]" in ran.err
        assert "2 x orders.send_confirmation: failed 3 times (MailError)" in ran.err
    assert rows.sql(_OPEN) == "2"
    assert outbox("dead-letters", "discard", "--all", answer="y\n").out == "Discarded 2 dead letters.\n"


@pytest.mark.parametrize("verb", ["replay", "discard"])
def test_a_dry_run_does_nothing(outbox: Outbox, rows: Rows, verb: str) -> None:
    rows.dead_letter(2)
    ran = outbox("dead-letters", verb, "--all", "--dry-run")
    assert (ran.code, ran.out.splitlines()[0]) == (0, f"2 dead letters would be {verb}ed; nothing was done.")
    assert outbox("dead-letters", verb, "1", "--dry-run", "--json").json["ids"] == [1]
    assert rows.sql(_OPEN) == "2"
    assert rows.sql(_MESSAGES) == "0"


def test_words_in_bytes_that_are_no_text_are_taken_and_found(outbox: Outbox, rows: Rows) -> None:
    """As the shell hands over what was typed or pasted in Latin-1."""
    rows.dead_letter(reason="'no such \ufffdser'")
    given = ("--by", "j\udcfcrgen", "--why", "gepr\udcfcft", "--error", "\udcfcser")
    assert outbox("dead-letters", "discard", *given).code == 0
    assert rows.sql("SELECT resolved_by, resolved_why FROM dead_letter") == "j\ufffdrgen|gepr\ufffdft"


def test_discard_closes_without_an_effect(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter()
    assert outbox("dead-letters", "discard", "1", "--why", "test order").out == "Discarded dead letter 1.\n"
    assert rows.sql("SELECT resolution, resolved_why FROM dead_letter") == "discarded|test order"
    assert rows.sql(_MESSAGES) == "0"
    ran = outbox("dead-letters", "replay", "1")
    assert (ran.code, "was discarded by" in ran.err) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Give ids, a filter such as --consumer, or --all"),
        (("1", "--all"), "either ids or filters"),
        (("1", "--queue", "email"), "either ids or filters"),
        (("one",), "is no dead letter's id"),
        (("--since", "yesterday"), "--since: 'yesterday' is no time"),
        (("--rate", "0", "--all"), "--rate"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(outbox: Outbox, rows: Rows, arguments: list[str], says: str) -> None:
    rows.dead_letter()
    ran = outbox("dead-letters", "replay", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1
    assert says in ran.err
    assert rows.sql(_OPEN) == "1"


def test_an_unknown_one_is_named(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter()
    for verb in ("show", "replay", "discard"):
        for reference in ("99", "9" * 30, "01937e5c-8a4e-7cc0-98c4-dc0c0c07398f"):
            ran = outbox("dead-letters", verb, *(["1"] if verb != "show" else []), reference)
            assert (ran.code, ran.out) == (4, "")
            assert f"there is no dead letter {reference}" in ran.err
    assert rows.sql(_OPEN) == "1"


def test_a_filter_that_matches_nothing_is_no_failure(outbox: Outbox) -> None:
    ran = outbox("dead-letters", "replay", "--all", "--yes")
    assert (ran.code, ran.out) == (0, "No open dead letter matches.\n")
    assert outbox("dead-letters", "replay", "--all", "--yes", "--json").json["done"] == []


def test_a_rate_is_kept(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(12)
    began = time.monotonic()
    assert outbox("dead-letters", "replay", "--all", "--yes", "--rate", "20").code == 0
    assert time.monotonic() - began >= 10 / 20  # the last batch is 2 of 12, and nothing waits after it
    assert rows.sql(_MESSAGES) == "12"


def test_thousands_are_replayed_in_batches_with_progress(start: Start, rows: Rows) -> None:
    ids = rows.dead_letter(3_000)
    process = start(["dead-letters", "replay", "--all", "--yes", "--rate", "2000"])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "Replayed 3,000 dead letters.\n")
    assert "replayed 3,000 of 3,000" in err
    assert rows.sql("SELECT count(DISTINCT xmin::text) > 10 FROM outbox_message") == "t"
    assert set(rows.sql("SELECT id FROM outbox_message").split()) == {str(each) for each in ids}


@pytest.mark.slow
def test_an_interrupted_replay_says_how_far_it_came_and_goes_on(start: Start, rows: Rows) -> None:
    rows.dead_letter(1_000)
    process = start(["dead-letters", "replay", "--all", "--yes", "--rate", "40"])
    until_sync(lambda: int(rows.sql(_MESSAGES)) > 0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted" in err
    assert "Traceback" not in err
    done = int(rows.sql(_MESSAGES))
    assert 0 < done < 1_000
    assert out in (f"Replayed {done} dead letters.\n", "Replayed dead letter 1.\n")
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution = 'replayed'") == str(done)
    process = start(["dead-letters", "replay", "--all", "--yes"])
    assert process.communicate(timeout=60)[0] == f"Replayed {1_000 - done} dead letters.\n"
    assert rows.sql(_MESSAGES) == "1000"


@pytest.mark.slow
def test_two_replays_at_once_share_the_work(start: Start, rows: Rows) -> None:
    rows.dead_letter(2_000)
    both = [start(["dead-letters", "replay", "--all", "--yes", "--json"]) for _ in range(2)]
    done: list[int] = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        done += json.loads(out)["done"]
    assert sorted(done) == list(range(1, 2_001))
    assert rows.sql(_MESSAGES) == "2000"


@pytest.mark.parametrize("action", ["replay", "discard"])
async def test_of_two_at_once_exactly_one_wins(
    two_connections: tuple[Connection, Connection], rows: Rows, action: Action
) -> None:
    rows.dead_letter()
    first, second = two_connections
    async with first.transaction():
        won = await resolve(first, action, [1], by="ann", why=None)
        waiting = asyncio.create_task(resolve(second, "replay", [1], by="bob", why=None))
        await until(lambda: rows.sql(_WAITING) == "1")
    lost = await waiting
    assert (won.done, lost.done, lost.refused) == ([1], [], [1])
    assert rows.sql("SELECT resolution, resolved_by FROM dead_letter") == f"{action}ed|ann"
    assert rows.sql(_MESSAGES) == ("1" if action == "replay" else "0")


async def test_an_interrupt_in_mid_batch_knows_what_that_batch_did(
    two_connections: tuple[Connection, Connection], rows: Rows
) -> None:
    rows.dead_letter(300)
    other, operator = two_connections
    async with other.transaction():
        await other.execute("SELECT FROM dead_letter WHERE id = 7 FOR UPDATE")
        replaying = asyncio.create_task(resolve(operator, "replay", range(1, 301), by="ann", why=None))
        await until(lambda: rows.sql(_WAITING) == "1")
        replaying.cancel()
    headway = await replaying
    assert headway.interrupted
    assert headway.done == list(range(1, 201))
    assert rows.sql(_MESSAGES) == "200"


async def test_a_replay_wakes_a_sleeping_relay(two_connections: tuple[Connection, Connection], rows: Rows) -> None:
    rows.dead_letter()
    sleeping, operator = two_connections
    woken = asyncio.Event()
    await sleeping.add_listener("outbox", lambda *_: woken.set())
    await sleeping.execute("SELECT pg_advisory_lock(outbox_gate())")
    await resolve(operator, "replay", [1], by="ann", why=None)
    async with asyncio.timeout(30):
        await woken.wait()
