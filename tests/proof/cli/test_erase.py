"""`outbox erase` takes what is stored of somebody out of every table, keeps the stories, and says what it did."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from uuid import uuid4

import asyncpg
import pytest

from service.ledger import erasing

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

_WHO = "Ann@Example.com"
_WHY = ("--why", "request 17")


def _payload(value: str) -> str:
    return "'" + json.dumps({"order": {"customers": ["x", value]}, "note": f"not {value}"}) + "'"


def _response(rows: Rows, key: str, body: str, path: str = "/orders") -> None:
    rows.sql(
        "INSERT INTO idempotency_key (scope, key, fingerprint, status, headers, body) "
        f"VALUES ('ann POST {path}', '{key}', '', 201, '[]', convert_to('{body}', 'UTF8'))"
    )


def _traces(rows: Rows, value: str) -> str:
    """In how many rows it still stands."""
    return rows.sql(
        f"SELECT (SELECT count(*) FROM outbox_message AS m WHERE m::text ILIKE '%{value}%')"
        f" + (SELECT count(*) FROM dead_letter AS d WHERE d::text ILIKE '%{value}%')"
        f" + (SELECT count(*) FROM outbox_erasure AS e WHERE e::text ILIKE '%{value}%')"
        f" + (SELECT count(*) FROM idempotency_key WHERE convert_from(body, 'UTF8') ILIKE '%{value}%')"
    )


@pytest.fixture
def stored(rows: Rows) -> Rows:
    """What there is of Ann, beside as much of Bob."""
    for who in (_WHO, "bob@example.com"):
        rows.message(2, state="'completed'", completed_at="now()", payload=_payload(who))
        failed = (
            "'"
            + json.dumps(
                [{"type": "MailError", "message": f"550 {who}", "attempt": 1, "at": "2026-01-01T00:00:00+00:00"}]
            )
            + "'"
        )
        rows.dead_letter(1, errors=failed, reason=f"'no mailbox {who}'")
        rows.dead_letter(
            1,
            payload=_payload(who),
            resolution="'discarded'",
            resolved_at="now()",
            resolved_by="'x'",
            resolved_why=f"'{who} left'",
        )
        _response(rows, who, json.dumps({"email": who}))
    return rows


def test_it_says_what_there_is_and_asks(outbox: Outbox, stored: Rows) -> None:
    before = _traces(stored, _WHO)
    ran = outbox("erase", "ann@example.com", *_WHY, "--dry-run")
    assert (ran.code, ran.out) == (
        0, "Would be erased: 2 deliveries, 2 dead letters, 1 responses; nothing was done.\n"
    )  # fmt: skip
    ran = outbox("erase", "ann@example.com", *_WHY, answer="n\n")
    assert (ran.code, ran.out) == (1, "")
    assert "2 deliveries, 2 dead letters, 1 responses\nErase what they say, for good? [y/N]" in ran.err
    assert outbox("erase", "ann@example.com", *_WHY).code == 1, "nobody answered"
    assert _traces(stored, _WHO) == before
    assert stored.sql("SELECT count(*) FROM outbox_erasure") == "0"


def test_it_erases_all_of_one_and_nothing_of_another(outbox: Outbox, stored: Rows) -> None:
    bob = _traces(stored, "bob@example.com")
    ran = outbox("erase", "ann@example.com", *_WHY, "--by", "dpo", answer="y\n")
    assert (ran.code, ran.out) == (0, "Erased: 2 deliveries, 2 dead letters, 1 responses.\n")
    assert _traces(stored, _WHO) == "0"
    assert _traces(stored, "bob@example.com") == bob
    record = "SELECT erased_by, erased_role, why, deliveries, dead_letters, responses FROM outbox_erasure"
    assert stored.sql(record) == "dpo|postgres|request 17|2|2|1"
    again = outbox("erase", "ann@example.com", *_WHY, "--yes", "--json")
    assert again.json == {
        "dry_run": False, "deliveries": 0, "dead_letters": 0, "responses": 0, "operations": 0, "open": 0, "left": 0
    }  # fmt: skip


def test_the_stories_stay(outbox: Outbox, stored: Rows) -> None:
    message = stored.sql("SELECT id FROM outbox_message WHERE payload::text ILIKE '%ann@%' LIMIT 1")
    letter = stored.sql("SELECT message_id FROM dead_letter WHERE errors::text ILIKE '%ann@%'")
    rows = stored.sql("SELECT count(*) FROM outbox_message"), stored.sql("SELECT count(*) FROM dead_letter")
    outbox("erase", _WHO, *_WHY, "--by", "dpo", "--yes")
    assert rows == (stored.sql("SELECT count(*) FROM outbox_message"), stored.sql("SELECT count(*) FROM dead_letter"))
    completed = outbox("events", "show", message).out
    assert "completed" in completed
    assert "erased" in completed
    story = outbox("events", "show", letter).out
    assert "MailError: erased" in story, "what happened, when"
    assert "discarded" in story
    assert outbox("dead-letters", "replay", letter).code == 4, "it could not run"


def test_a_key_that_takes_turns_goes_too(outbox: Outbox, rows: Rows) -> None:
    headers = """'{"share": "ada@example.com", "correlation_id": "c"}'"""
    payload = """'{"tenant": "ada@example.com"}'"""
    rows.message(state="'completed'", completed_at="now()", headers=headers, payload=payload)
    rows.dead_letter(headers=headers, payload=payload)
    assert outbox("erase", "ada@example.com", *_WHY, "--yes").code == 0
    for table in ("outbox_message", "dead_letter"):
        assert rows.sql(f"SELECT DISTINCT headers FROM {table}") == ('{"correlation_id": "c"}')


def test_what_is_open_is_left_alone_and_said(outbox: Outbox, rows: Rows) -> None:
    customer = str(uuid4())
    for state in ("pending", "dispatched", "running"):
        rows.message(state=f"'{state}'", payload=_payload(customer))
    rows.message(state="'completed'", completed_at="now()", payload=_payload(customer))
    ran = outbox("erase", customer.upper(), *_WHY, "--yes")
    assert (ran.code, ran.out) == (1, "Erased: 1 deliveries, 0 dead letters, 0 responses.\n")
    assert "3 are open or were stored meanwhile" in ran.err
    assert _traces(rows, customer) == "3"
    rows.sql("UPDATE outbox_message SET state = 'completed', completed_at = now()")
    assert outbox("erase", customer, *_WHY, "--yes").code == 0
    assert _traces(rows, customer) == "0"


def test_what_was_done_stays_without_the_value(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(1, errors="'[]'", reason=f"'no mailbox {_WHO}'")
    which = ("--error", f"mailbox {_WHO}", "--queue", "email")
    outbox("dead-letters", "discard", *which, "--by", "eve", "--why", f"{_WHO} left")
    ran = outbox("erase", _WHO, *_WHY, "--yes")
    assert (ran.code, ran.out) == (0, "Erased: 0 deliveries, 1 dead letters, 0 responses, 1 operations.\n")
    record = "SELECT kind, asked_by, why, about ->> 'queue', about ->> 'error', done FROM outbox_operation"
    assert rows.sql(record) == "discard|eve|erased|email|erased|1"
    assert rows.sql("SELECT operations FROM outbox_erasure") == "1"


def test_a_value_is_all_of_a_string_in_a_payload(outbox: Outbox, rows: Rows) -> None:
    rows.message(state="'completed'", completed_at="now()", payload=_payload("joann@example.com"))
    rows.message(state="'completed'", completed_at="now()", payload="'{\"id\": 4711471}'")
    assert "0 deliveries" in outbox("erase", _WHO, "471147", *_WHY, "--dry-run").out
    assert "1 deliveries" in outbox("erase", "4711471", *_WHY, "--dry-run").out


def test_a_response_that_names_somebody_beyond_ascii(outbox: Outbox, rows: Rows) -> None:
    _response(rows, "one", '{"name": "Zoë Ærø"}')
    _response(rows, "two", "{}", path="/customers/0193aaaa")
    assert "2 responses" in outbox("erase", "Zoë Ærø", "0193AAAA", *_WHY, "--yes").out
    assert rows.sql("SELECT DISTINCT status FROM idempotency_key") == "410"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ann", *_WHY), "is too short"),
        ((_WHO, "--why", "ann@example.com asked"), "--why would keep what is to be erased"),
        ((_WHO,), "Missing option '--why'"),
        (_WHY, "Missing argument"),
    ],
)
def test_what_would_go_wrong_is_refused(outbox: Outbox, arguments: tuple[str, ...], says: str) -> None:
    ran = outbox("erase", *arguments)
    assert ran.code == 2
    assert says in ran.err


async def test_it_goes_page_by_page_and_counts_as_it_goes(
    rows: Rows, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is interrupted has its record too."""
    monkeypatch.setattr(erasing, "PAGE", 3)
    await asyncio.to_thread(rows.message, 10, state="'completed'", completed_at="now()", payload=_payload(_WHO))
    connection = await asyncpg.connect(database_url)
    counted: list[int] = []

    async def interrupt(seconds: float) -> None:
        counted.append(await connection.fetchval("SELECT deliveries FROM outbox_erasure"))
        if len(counted) == 2:
            raise asyncio.CancelledError

    monkeypatch.setattr(asyncio, "sleep", interrupt)
    with pytest.raises(asyncio.CancelledError):
        await erasing.erase(connection, [_WHO], by="dpo", why="request 17")
    await connection.close()
    assert counted == [3, 6]
    assert await asyncio.to_thread(_traces, rows, _WHO) == "4"
