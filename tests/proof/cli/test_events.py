"""`outbox events list` finds the newest events, and `events show` those of a correlation id."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from service.ledger import event_search
from service.ledger.ids import event_of, first_id_after, new_event_id
from tests.proof.cli.conftest import json_literal

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows


def _listed(outbox: Outbox, *arguments: str) -> list[UUID]:
    document = outbox("events", "list", "--json", *arguments).json
    return [UUID(each["event_id"]) for each in document["events"]]


def _at(moment: str) -> UUID:
    return UUID(int=first_id_after(datetime.fromisoformat(moment)).int | 7 << 76)


def _one_each(rows: Rows, count: int) -> list[UUID]:
    """Events of one delivery each, oldest first."""
    ids = [new_event_id() for _ in range(count)]
    for each in ids:
        rows.message(event_id=each)
    return ids


def _correlated(value: object) -> str:
    return json_literal({"correlation_id": str(value)})


def test_one_line_per_event_the_newest_first(outbox: Outbox, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new_event_id(), new_event_id()
    rows.message(event_id=first, created_at="clock_timestamp() - interval '3 hours'")
    rows.message(event_id=second, number=1)
    rows.message(event_id=second, number=2, consumer="'audit.note'", state="'completed'")
    monkeypatch.setenv("COLUMNS", "160")
    ran = outbox("events", "list")
    assert (ran.code, ran.err) == (0, "")
    header, *lines = [re.split(r"\s{2,}", each.strip()) for each in ran.out.splitlines()]
    assert header == ["AGE", "EVENT", "TYPE", "CORRELATION", "DELIVERIES"]
    assert [each[1:4] for each in lines] == [[str(each), "order.placed", "abc"] for each in (second, first)]
    assert lines[1][0] == "3h"
    assert [each[4] for each in lines] == [
        "orders.reserve_stock:pending audit.note:completed",
        "orders.reserve_stock:pending",
    ]


def test_events_are_found_by_a_value_in_their_payload(outbox: Outbox, rows: Rows) -> None:
    event_id, other = new_event_id(), new_event_id()
    rows.message(event_id=event_id, payload="""'{"order": {"id": "A-17", "count": 3}}'""")
    rows.message(event_id=other, payload="""'{"id": "A-177", "count": 30}'""")
    assert _listed(outbox, "--value", "a-17") == _listed(outbox, "--value", "3") == [event_id]
    assert _listed(outbox, "--value", "17") == _listed(outbox, "--value", "a-17", "--state", "dead") == []


def test_what_was_discarded_of_an_event_is_listed_as_that(outbox: Outbox, rows: Rows) -> None:
    [dead] = rows.dead_letter()
    rows.message(event_id=event_of(dead), number=2)
    outbox("dead-letters", "discard", "1", "--why", "never mind")
    [event] = outbox("events", "list", "--json").json["events"]
    assert [each["state"] for each in event["deliveries"]] == ["discarded", "pending"]


def test_the_list_fits_80_columns_and_keeps_the_states(outbox: Outbox, rows: Rows) -> None:
    event_id = new_event_id()
    for number, state in enumerate(("completed", "pending", "completed"), start=1):
        rows.message(event_id=event_id, number=number, state=f"'{state}'", event_type="repeat('order.', 20)")
    rows.message(consumer="'a.b'", created_at="'2016-01-02T03:04:05Z'")
    lines = outbox("events", "list").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].endswith("  a.b:pending")
    assert str(event_id) in lines[2]
    assert "1 pending, 2 comp" in lines[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--type", "order.paid"),
        ("--consumer", "audit.note"),
        ("--state", "running"),
        ("--type", "order.paid", "--consumer", "audit.note", "--state", "running"),
    ],
)
def test_filters_choose_events_by_a_delivery(outbox: Outbox, rows: Rows, arguments: tuple[str, ...]) -> None:
    _one_each(rows, 2)
    wanted = new_event_id()
    rows.message(event_id=wanted, event_type="'order.paid'")
    rows.message(
        event_id=wanted, number=2, event_type="'order.paid'", consumer="'audit.note'", state="'running'", attempts="1"
    )
    _one_each(rows, 1)
    listed = outbox("events", "list", "--json", *arguments).json["events"]
    assert [UUID(each["event_id"]) for each in listed] == [wanted]
    assert [(each["consumer"], each["state"]) for each in listed[0]["deliveries"]] == [
        ("orders.reserve_stock", "pending"),
        ("audit.note", "running"),
    ]
    assert _listed(outbox, "--consumer", "audit.note", "--state", "pending") == []


def test_since_and_until_are_bounds_of_the_ids(outbox: Outbox, rows: Rows) -> None:
    early, middle, late = (_at(f"2026-01-02T0{hour}:00:00+00:00") for hour in (1, 2, 3))
    for each in (early, middle, late):
        rows.message(event_id=each)
    assert _listed(outbox, "--since", "2026-01-02T02:00:00Z") == [late, middle]
    assert _listed(outbox, "--until", "2026-01-02T02:00:00Z") == [early]
    assert _listed(outbox, "--since", "1960-01-01") == [late, middle, early]
    assert _listed(outbox, "--since", "2026-01-02T01:30:00", "--until", "2026-01-02T02:30:00") == [middle]
    now = new_event_id()
    rows.message(event_id=now)
    assert _listed(outbox, "--since", "2h") == [now]
    assert now not in _listed(outbox, "--until", "2h")


def test_open_dead_letters_are_listed_and_resolved_ones_are_not(outbox: Outbox, rows: Rows) -> None:
    _one_each(rows, 1)
    (dead,) = rows.dead_letter()
    (replayed,) = rows.dead_letter(resolution="'replayed'", resolved_at="now()", resolved_by="'ann'")
    _one_each(rows, 1)
    listed = _listed(outbox)
    assert len(listed) == 3
    assert listed[1] == UUID(int=dead.int & ~0xFF)
    assert UUID(int=replayed.int & ~0xFF) not in listed
    (event,) = outbox("events", "list", "--state", "dead", "--json").json["events"]
    assert event["deliveries"] == [
        {"message_id": str(dead), "consumer": "orders.send_confirmation", "state": "dead"},
    ]


def test_a_limit_that_was_reached_is_said(outbox: Outbox, rows: Rows) -> None:
    ids = _one_each(rows, 3)
    assert _listed(outbox, "--limit", "2") == [ids[2], ids[1]]
    assert outbox("events", "list", "--limit", "2").err == "The newest 2; --limit or --until shows older ones.\n"
    assert outbox("events", "list", "--limit", "3").err == ""


def test_small_pages_leave_nothing_out(outbox: Outbox, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_search, "PAGE", 2)
    event_id = new_event_id()
    for number in (1, 2, 3):
        rows.message(event_id=event_id, number=number)
    (dead,) = rows.dead_letter()
    # Its earlier deaths stand under the same id, and the index gives them first.
    rows.sql(
        "INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers,"
        " attempts, dispatches, created_at, errors, reason, resolution, resolved_at, resolved_by)"
        " SELECT message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts, dispatches,"
        " created_at, '[]', 'again', 'replayed', now(), 'ann' FROM dead_letter, generate_series(1, 2)"
    )
    later = _one_each(rows, 3)
    assert _listed(outbox) == [*reversed(later), UUID(int=dead.int & ~0xFF), event_id]


def test_a_walk_that_was_cut_short_says_so(outbox: Outbox, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.message(event_type="'order.paid'")
    _one_each(rows, 4)
    monkeypatch.setattr(event_search, "BOUND", 4)
    monkeypatch.setattr(event_search, "PAGE", 3)
    ran = outbox("events", "list", "--type", "order.paid")
    assert (ran.code, ran.out) == (0, "No event matches.\n")
    assert ran.err == "Looked at the newest 4 deliveries; narrow with --until to see older ones.\n"
    document = outbox("events", "list", "--type", "order.paid", "--json").json
    assert document == {"looked_at": 4, "complete": False, "events": []}
    assert outbox("events", "show", "no-such").err.endswith("correlation id of any of the newest 4 deliveries\n")
    monkeypatch.setattr(event_search, "BOUND", 6)
    assert outbox("events", "list", "--type", "order.paid").err == ""


def test_an_unknown_state_is_refused(outbox: Outbox) -> None:
    ran = outbox("events", "list", "--state", "done")
    assert (ran.code, ran.out) == (2, "")
    assert "'done' is not one of pending, dispatched, running, completed, dead" in ran.err


@pytest.mark.parametrize("correlation", ["checkout-17", "5d4f3c8e-7a55-4a39-9f7d-0d6b1f3f2a10"])
def test_the_stories_of_a_correlation_id(outbox: Outbox, rows: Rows, correlation: str) -> None:
    first, second = new_event_id(), new_event_id()
    rows.message(event_id=first, headers=_correlated(correlation))
    rows.message(event_id=second, headers=_correlated(correlation))
    _one_each(rows, 1)
    (dead,) = rows.dead_letter(headers=_correlated(correlation))
    expected = [str(first), str(second), str(UUID(int=dead.int & ~0xFF))]
    ran = outbox("events", "show", correlation)
    assert (ran.code, ran.err) == (0, "")
    assert re.findall(r"^Event (\S+)$", ran.out, re.MULTILINE) == expected
    stories = outbox("events", "show", correlation, "--json").json
    assert [each["event_id"] for each in stories] == expected


def test_no_more_than_20_stories_are_told(outbox: Outbox, rows: Rows) -> None:
    ids = _one_each(rows, 22)
    ran = outbox("events", "show", "abc")
    assert re.findall(r"^Event (\S+)$", ran.out, re.MULTILINE) == [str(each) for each in ids[2:]]
    assert ran.err == "Only the newest 20 events of this correlation id are told.\n"
