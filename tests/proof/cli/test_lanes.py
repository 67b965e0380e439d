"""Lanes that stand are listed with what they wait for, and a stranded one is repaired."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.proof.cli.conftest import error, json_literal

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

UNPARKED = "SELECT count(*) FROM outbox_message WHERE due_at < outbox_parked() AND lane = '{}'"
STRAND = "UPDATE outbox_message SET due_at = outbox_parked(), state = 'pending' WHERE lane = 'search:7'"


def publish(rows: Rows, lane: str, count: int) -> None:
    """As `publish` does."""
    rows.message(count, lane=f"'{lane}'", due_at="outbox_parked()")


def block(rows: Rows, lane: str) -> None:
    """Let the first of a lane die."""
    rows.sql(f"DELETE FROM outbox_message WHERE lane = '{lane}' AND due_at < outbox_parked()")
    rows.dead_letter(lane=f"'{lane}'", position="0", blocks="true")


def strand(rows: Rows, lane: str) -> None:
    """What nothing but somebody's own SQL can do."""
    publish(rows, lane, 2)
    rows.sql(f"UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = '{lane}'")


def test_nothing_waits(outbox: Outbox, rows: Rows) -> None:
    publish(rows, "search:7", 1)
    assert outbox("lanes", "list").out == "Nothing waits in a lane.\n"
    assert outbox("lanes", "list", "--stranded").out == "No lane is stranded.\n"
    assert outbox("status", "--fail-if", "blocked>0,stranded>0,parked>0").code == 0


def test_the_list_says_how_many_wait_and_for_what(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(lane="'search:7'", position="0", blocks="true", died_at="now() - interval '3 hours'")
    publish(rows, "search:7", 2)
    for lane in ("search:8", "search:9", "search:10", "search:11"):
        publish(rows, lane, 2)
    head = "WHERE due_at < outbox_parked() AND lane"
    rows.sql(f"UPDATE outbox_message SET state = 'running', attempts = 2 {head} = 'search:8'")
    rows.sql(f"UPDATE outbox_message SET state = 'dispatched' {head} = 'search:9'")
    failed = f"attempts = 1, errors = {json_literal([error('MailError', 'no')])}, due_at = now() + interval '605 min'"
    rows.sql(f"UPDATE outbox_message SET {failed} {head} = 'search:10'")
    rows.sql("INSERT INTO paused_queue (queue, paused_by) VALUES ('other', 'ada')")
    rows.sql("UPDATE outbox_message SET queue = 'other' WHERE lane = 'search:11'")
    strand(rows, "search:12")
    shown = [" ".join(each.split()) for each in outbox("lanes", "list").out.splitlines()]
    assert shown == [
        "LANE WAITING FOR",
        "search:12 2 nothing: outbox lanes repair",
        "search:7 2 dead letter 1, 3h ago: failed 3 times",
        "search:10 1 attempt 2 in 10h, after MailError",
        "search:11 1 queue other is paused",
        "search:8 1 a worker is at attempt 2",
        "search:9 1 waits in the broker for a worker",
    ]
    listed = outbox("lanes", "list", "--json", "--limit", "1").json
    assert listed["total"] == 6
    assert [(each["lane"], each["waiting"], each["kind"]) for each in listed["lanes"]] == [("search:12", 2, "stranded")]


def test_a_stranded_lane_is_repaired_and_no_other(outbox: Outbox, rows: Rows) -> None:
    strand(rows, "search:7")
    publish(rows, "search:8", 2)
    rows.dead_letter(lane="'search:9'", position="0", blocks="true")
    publish(rows, "search:9", 1)
    assert "stranded: 1" in outbox("doctor").out
    assert outbox("status", "--fail-if", "stranded>0").code == 1
    refused = outbox("lanes", "repair", "search:8", "search:9")
    assert (refused.code, refused.out) == (4, "Repaired 0 lanes.\n")
    assert "not stranded: search:8, search:9" in refused.err
    repaired = outbox("lanes", "repair", "--by", "ada", "--why", "a clean-up by hand")
    assert repaired.out == "Repaired 1 lane.\n"
    assert [rows.sql(UNPARKED.format(f"search:{number}")) for number in (7, 8, 9)] == ["1", "1", "0"]
    assert outbox("lanes", "repair").out == "Repaired 0 lanes.\n"
    assert outbox("lanes", "list", "--stranded").out == "No lane is stranded.\n"
    [act] = outbox("audit", "--json").json["acts"]
    assert (act["kind"], act["by"], act["why"]) == ("repair", "ada", "a clean-up by hand")
    assert "repaired lane search:7" in outbox("audit").out


@pytest.mark.parametrize("command", ["status", "doctor"])
def test_lanes_that_stand_are_told_of(outbox: Outbox, rows: Rows, command: str) -> None:
    rows.dead_letter(lane="'search:7'", position="0", blocks="true")
    assert "outbox lanes list" in outbox(command).out


def test_a_dead_letter_says_what_it_holds_up(outbox: Outbox, rows: Rows) -> None:
    [delivery] = rows.dead_letter(lane="'search:7'", position="0", blocks="true")
    publish(rows, "search:7", 3)
    assert "search:7 stands, and 3 wait in it until" in " ".join(outbox("dead-letters", "show", "1").out.split())
    told = " ".join(outbox("events", "show", str(delivery)).out.split())
    assert "Until then lane search:7 stands." in told
    outbox("dead-letters", "discard", "1")
    assert "stands" not in outbox("dead-letters", "show", "1").out


def test_what_is_parked_says_so(outbox: Outbox, rows: Rows) -> None:
    publish(rows, "search:7", 1)
    publish(rows, "search:7", 1)
    parked = rows.sql("SELECT id FROM outbox_message WHERE due_at = outbox_parked()")
    told = " ".join(outbox("events", "show", parked).out.split())
    assert "It waits for its turn in lane search:7: `outbox lanes list`." in told
