"""`outbox events show` tells what happened to an event and what happens next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest

from service.ledger.ids import delivery_id, new_event_id
from tests.proof.cli.conftest import error, json_literal

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

_HOUR = "interval '1 hour'"


def _next(outbox: Outbox, event: UUID) -> str:
    text: str = outbox("events", "show", str(event), "--json").json["deliveries"][0]["next"]
    return text


def test_the_story_of_a_retry(outbox: Outbox, rows: Rows) -> None:
    errors = [error("MailError", "greylisted"), error("MailError", "busy", attempt=2, at="2026-01-02T03:04:09+00:00")]
    (delivery_id,) = rows.message(
        attempts="2",
        dispatches="2",
        created_at="'2026-01-02T03:04:05Z'",
        dispatched_at="'2026-01-02T03:04:08Z'",
        started_at="'2026-01-02T03:04:08.5Z'",
        due_at="clock_timestamp() + interval '12 s'",
        errors=json_literal(errors),
    )
    ran = outbox("events", "show", str(delivery_id))
    assert ran.code == 0
    story = ran.out.splitlines()
    assert story[4:] == [
        "",
        "orders.reserve_stock, queue stock: PENDING",
        f"  delivery {delivery_id}",
        "  2026-01-02 03:04:05Z  It was published for orders.reserve_stock.",
        "  2026-01-02 03:04:06Z  Its 1st attempt failed with MailError: greylisted",
        "  2026-01-02 03:04:08Z  The relay handed it to the broker, for the 2nd time.",
        "  2026-01-02 03:04:09Z  Its 2nd attempt failed with MailError: busy",
        story[-1],
    ]
    assert story[-1] in {f"  What is next: It waits for its 3rd attempt, due in {each} s." for each in (12, 11, 10)}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"due_at": f"now() + {_HOUR}"}, "It is delayed; its 1st attempt is due in 60 min."),
        ({"due_at": f"now() - {_HOUR}"}, "It waits for its 1st attempt, due for 60 min."),
        ({"state": "'dispatched'", "due_at": f"now() + {_HOUR}"}, "hands it over again in 60 min."),
        ({"state": "'running'", "attempts": "3", "due_at": f"now() + {_HOUR}"}, "A worker is at its 3rd attempt"),
        ({"state": "'completed'", "completed_at": "'2026-01-02T03:04:05Z'"}, "kept until 2026-01-09 03:04Z"),
    ],
)
def test_what_is_next(outbox: Outbox, rows: Rows, columns: dict[str, Any], says: str) -> None:
    (delivery_id,) = rows.message(**columns)
    assert says in _next(outbox, delivery_id)


@pytest.mark.parametrize("name", ["stock", "--all"])
def test_a_paused_queue_is_part_of_what_is_next(outbox: Outbox, rows: Rows, name: str) -> None:
    (delivery_id,) = rows.message()
    outbox("queues", "pause", name, "--by", "ann")
    assert f"Queue stock is paused by ann: `outbox queues resume {name}`" in _next(outbox, delivery_id)


def test_a_limited_queue_is_part_of_what_is_next(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.message()
    outbox("queues", "limit", "stock", "--rate", "10/s", "--by", "ann")
    assert "Queue stock is limited to 10/s, 1 at a time by ann." in _next(outbox, delivery_id)


def test_what_follows_another_event_says_so(outbox: Outbox, rows: Rows) -> None:
    first = new_event_id()
    (delivery_id,) = rows.message(due_at="outbox_parked()", headers=json_literal({"after": str(first)}))
    assert f"It is published once all consumers of event {first} are done." in _next(outbox, delivery_id)


def test_a_completed_delivery_names_its_last_attempt(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.message(
        state="'completed'",
        attempts="2",
        errors=json_literal([error("MailError", "busy")]),
        started_at="'2026-01-02T03:05:00Z'",
        completed_at="'2026-01-02T03:05:01Z'",
    )
    out = outbox("events", "show", str(delivery_id)).out
    assert "2026-01-02 03:05:00Z  A worker began its 2nd attempt." in out
    assert "2026-01-02 03:05:01Z  It was completed." in out


def test_death_replay_and_second_death_are_told_in_order(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter()
    assert "`outbox dead-letters replay 1`" in _next(outbox, delivery_id)
    outbox("dead-letters", "replay", "1", "--by", "ann", "--why", "mail is back")
    assert "It waits for its 1st attempt" in _next(outbox, delivery_id)
    rows.sql("DELETE FROM outbox_message")
    assert "It was replayed and completed" in _next(outbox, delivery_id)
    rows.sql(
        "INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers,"
        " attempts, dispatches, created_at, errors, reason) SELECT message_id, event_id, event_type, version,"
        " consumer, queue, payload, headers, attempts, dispatches, created_at, '[]', 'again' FROM dead_letter"
    )
    outbox("dead-letters", "discard", "2", "--by", "bob")
    story = outbox("events", "show", str(delivery_id), "--json").json["deliveries"][0]
    assert [step["what"] for step in story["steps"]] == [
        "It was published for orders.send_confirmation.",
        "Its 1st attempt failed with MailError: 550 no such user",
        "It became dead letter 1: failed 3 times.",
        "ann replayed it: mail is back.",
        "It became dead letter 2: again.",
        "bob discarded it.",
    ]
    assert story["state"] == "discarded"


def test_every_delivery_of_the_event_and_of_no_other(outbox: Outbox, rows: Rows) -> None:
    event_id = new_event_id()
    rows.message(event_id=event_id)
    rows.message(event_id=event_id, number=255, consumer="'audit.note'")
    rows.message(event_id=UUID(int=event_id.int + 256), consumer="'audit.other'")
    rows.message(event_id=UUID(int=event_id.int - 256), consumer="'audit.other'")
    for given in (event_id, delivery_id(event_id, 1), delivery_id(event_id, 255), delivery_id(event_id, 7)):
        story = outbox("events", "show", str(given), "--json").json
        assert story["event_id"] == str(event_id)
        assert [each["consumer"] for each in story["deliveries"]] == ["orders.reserve_stock", "audit.note"]


def test_the_story_fits_80_columns(outbox: Outbox, rows: Rows) -> None:
    (delivery_id,) = rows.dead_letter(
        errors=json_literal([error("MailError", "no " * 150)]), reason="'no ' || repeat('a b ', 90)"
    )
    lines = outbox("events", "show", str(delivery_id)).out.splitlines()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("reference", "code", "says"),
    [
        ("01937e5c-8a4e-7cc0-98c4-dc0c0c073900", 4, "nothing is known of event 01937e5c-8a4e-7cc0-98c4-dc0c0c073900"),
        ("17", 4, "nor is it the correlation id of any other"),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", 4, "nothing is known"),
    ],
)
def test_an_id_that_leads_nowhere(outbox: Outbox, reference: str, code: int, says: str) -> None:
    ran = outbox("events", "show", reference)
    assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 1)
    assert says in ran.err
