"""`outbox schedules`: what is published again and again, and the hand that stops it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

_PAUSED = "SELECT name, paused_by, why FROM outbox_schedule WHERE paused_at IS NOT NULL"
_OPEN = "SELECT count(*) FROM outbox_message WHERE consumer = 'outbox.tick' AND state <> 'completed'"


@pytest.fixture
def nightly(rows: Rows) -> Rows:
    """A schedule whose next tick is due in an hour."""
    (tick,) = rows.message(
        event_type="'outbox.tick'",
        consumer="'outbox.tick'",
        queue="'email'",
        payload="""'{"schedule": "report.nightly", "at": "2126-01-01T02:00:00+00:00"}'""",
        due_at="now() + interval '1 hour'",
    )
    rows.sql(
        f"""INSERT INTO outbox_schedule (name, declared, event_type, version, payload, cron, tz, catch_up, queue,
                next_at, tick_id)
            VALUES ('report.nightly', true, 'report.nightly', 1, '{{}}', '0 3 * * *', 'Europe/Berlin', 'latest',
                'email', date_trunc('second', now() + interval '1 hour'), '{tick}')"""
    )
    return rows


def test_there_may_be_none(outbox: Outbox) -> None:
    assert (outbox("schedules", "list").out, outbox("schedules", "list").code) == ("There is no schedule.\n", 0)


def test_the_list_tells_what_each_does_next(outbox: Outbox, nightly: Rows) -> None:
    nightly.sql(
        """INSERT INTO outbox_schedule (name, declared, event_type, version, payload, every, tz, catch_up, queue,
               next_at)
           VALUES ('ping', false, 'a.pinged', 1, '{}', interval '90 seconds', 'UTC', 'all', 'email', now())"""
    )
    lost, on = outbox("schedules", "list").out.splitlines()[1:]
    assert lost.split()[:3] == ["ping", "every", "90s"]
    assert "its tick is lost" in lost
    assert "0 3 * * *" in on
    assert on.split()[-1] == "on"
    ping, report = outbox("schedules", "list", "--json").json["schedules"]
    assert (ping["state"], ping["every"], ping["declared"]) == ("lost", 90, False)
    assert (report["state"], report["cron"], report["tz"]) == ("on", "0 3 * * *", "Europe/Berlin")


def test_what_keeps_it_from_firing_is_told(outbox: Outbox, nightly: Rows) -> None:
    nightly.sql("UPDATE outbox_schedule SET next_at = next_at - interval '2 hours'")
    assert "late: no worker of" in outbox("schedules", "list").out
    nightly.dead_letter(consumer="'outbox.tick'", event_type="'outbox.tick'")
    nightly.sql("DELETE FROM outbox_message")
    nightly.sql("UPDATE outbox_schedule SET tick_id = message_id FROM dead_letter")
    assert "stopped by dead letter 1" in outbox("schedules", "list").out
    assert outbox("schedules", "list", "--json").json["schedules"][0]["state"] == "dead"


def test_the_doctor_tells_of_those_that_fire_no_more(outbox: Outbox, nightly: Rows) -> None:
    def problems() -> list[tuple[str, str]]:
        found = outbox("doctor", "--json").json["findings"]
        return [(each["seen"], each["cure"]) for each in found if each["check"] == "schedules" and each["cure"]]

    assert problems() == []
    nightly.dead_letter(consumer="'outbox.tick'", event_type="'outbox.tick'")
    nightly.sql("UPDATE outbox_schedule SET tick_id = message_id FROM dead_letter")
    for number in range(2):
        nightly.sql(
            f"""INSERT INTO outbox_schedule (name, declared, event_type, version, payload, every, tz, catch_up, queue,
                    next_at)
                VALUES ('ping.{number}', false, 'a.pinged', 1, '{{}}', interval '90 seconds', 'UTC', 'all', 'email',
                    now())"""
        )
    assert problems() == [
        ("report.nightly is stopped by dead letter 1", "outbox dead-letters replay 1"),
        ("ping.0 has lost its next tick, and 1 more like it", "outbox schedules resume ping.0"),
    ]
    outbox("schedules", "pause", "report.nightly")
    outbox("schedules", "resume", "ping.1")
    assert problems() == [("ping.0 has lost its next tick", "outbox schedules resume ping.0")]


def test_pause_and_resume(outbox: Outbox, nightly: Rows) -> None:
    ran = outbox("schedules", "pause", "report.nightly", "--by", "ann", "--why", "stocktaking")
    assert (ran.code, ran.out) == (0, "Paused report.nightly. To go on: outbox schedules resume report.nightly\n")
    assert nightly.sql(_PAUSED) == "report.nightly|ann|stocktaking"
    assert nightly.sql(_OPEN) == "0"
    assert "paused 0s ago by ann" in outbox("schedules", "list").out
    assert "was paused already" in outbox("schedules", "pause", "report.nightly", "--by", "bob").out
    assert nightly.sql(_PAUSED) == "report.nightly|ann|stocktaking"
    resumed = outbox("schedules", "resume", "report.nightly")
    assert (resumed.code, resumed.out) == (0, "Resumed report.nightly. It fires in 60 min.\n")
    assert (nightly.sql(_PAUSED), nightly.sql(_OPEN)) == ("", "1")
    again = outbox("schedules", "resume", "report.nightly")
    assert (again.code, "was not paused" in again.err) == (4, True)
    audit = outbox("audit", "--json").json["acts"]
    assert [(each["kind"], each["by"], each["about"]) for each in audit[1:]] == [
        ("pause", "ann", {"schedule": "report.nightly"})
    ]
    assert "resumed schedule report.nightly" in outbox("audit").out


def test_run_fires_once_and_tells_where_to_look(outbox: Outbox, nightly: Rows) -> None:
    ran = outbox("schedules", "run", "report.nightly", "--by", "ann", "--why", "the printer was away", "--json")
    assert ran.code == 0
    event_id = ran.json["event_id"]
    told = outbox("events", "show", event_id).out
    assert "ann asked for the schedule report.nightly to fire: the printer was away." in " ".join(told.split())
    assert nightly.sql(_OPEN) == "2"
    assert "ran schedule report.nightly" in outbox("audit").out


def test_the_story_of_a_tick_says_whose_it_is(outbox: Outbox, nightly: Rows) -> None:
    event_id = nightly.sql("SELECT event_id FROM outbox_message")
    told = " ".join(outbox("events", "show", event_id).out.split())
    assert "The schedule report.nightly fires for 2126-01-01T02:00:00+00:00." in told


@pytest.mark.parametrize("command", ["pause", "resume", "run"])
def test_a_schedule_that_is_not_there(outbox: Outbox, nightly: Rows, command: str) -> None:
    ran = outbox("schedules", command, "report.weekly")
    assert (ran.code, "there is no schedule 'report.weekly'" in ran.err) == (4, True)
