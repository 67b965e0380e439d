"""`outbox dead-letters edit` replays one with another payload, from the command line, a file or an editor."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from service.ledger.ids import MAX_CONSUMERS, delivery_id, event_of
from tests.proof.ledger import domain

if TYPE_CHECKING:
    from pathlib import Path

    from tests.proof.cli.conftest import Outbox, Rows

_SUBJECT = "0193c3f4-8a51-7c5e-9b1a-4f6f3a2b1c0d"
_PAYLOAD = {"subject_id": _SUBJECT, "how": "die"}


@pytest.fixture
def dead(rows: Rows) -> str:
    """The id of the delivery that is dead letter 1, for a consumer that this process knows."""
    event_type, payload = f"'{domain.Happened.event_type}'", f"'{json.dumps(_PAYLOAD)}'"
    return str(rows.dead_letter(consumer="'ledger.react'", event_type=event_type, payload=payload)[0])


def _editor(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    """An editor that does the next of these with the file's text each time."""
    program = folder / "an editor.py"
    program.write_text(
        f"import sys, pathlib\nsteps, path = {list(steps)!r}, pathlib.Path(sys.argv[1])\n"
        f"count = pathlib.Path({str(folder / 'count')!r})\n"
        "number = len(count.read_text()) if count.exists() else 0\ncount.write_text('x' * (number + 1))\n"
        "old, new = steps[number].split('>')\npath.write_text(path.read_text().replace(old, new))\n"
        "assert path.parent.stat().st_mode & 0o777 == 0o700, 'others may read it'\n"
    )
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", f"{sys.executable} '{program}'")


def test_a_field_is_set(outbox: Outbox, rows: Rows, dead: str) -> None:
    ran = outbox("dead-letters", "edit", dead, "--set", "how=well", "--by", "ann", "--why", "a typing error")
    new = rows.sql("SELECT id FROM outbox_message")
    assert (ran.code, ran.out) == (0, f"Replayed dead letter 1 with another how, as delivery {new}.\n")
    assert json.loads(rows.sql("SELECT payload FROM outbox_message")) == _PAYLOAD | {"how": "well", "raw": False}
    assert rows.sql("SELECT payload ->> 'how', resolution, resolved_by FROM dead_letter") == "die|edited|ann"
    shown = outbox("dead-letters", "show", "1").out
    assert "It was edited by ann" in shown
    assert [each["id"] for each in outbox("dead-letters", "list", "--state", "edited", "--json").json["dead_letters"]]
    audit = outbox("audit", "--json").json["acts"][0]
    assert (audit["did"], audit["about"]["delivery"]) == ("edited dead letter 1: how", new)
    ran = outbox("dead-letters", "edit", "1", "--set", "how=other")
    assert (ran.code, "dead letter 1 was edited by ann" in ran.err) == (4, True)


def test_the_story_tells_both(outbox: Outbox, rows: Rows, dead: str) -> None:
    outbox("dead-letters", "edit", "1", "--set", "how=", "--by", "ann")
    story = outbox("events", "show", dead).out
    assert "ledger.react, queue email: EDITED" in story
    assert "ann replayed it with another payload" in story
    assert "ledger.react, queue email: PENDING" in story
    assert "Nothing. What was corrected goes its own way." in story


def test_a_dry_run_checks_and_does_nothing(outbox: Outbox, rows: Rows, dead: str) -> None:
    ran = outbox("dead-letters", "edit", "1", "--set", "how=well", "--dry-run")
    assert (ran.code, "nothing was done" in ran.out) == (0, True)
    assert outbox("dead-letters", "edit", "1", "--set", "hwo=well", "--dry-run").code == 1
    assert rows.sql("SELECT count(*) FROM outbox_message") == "0"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--set", "hwo=well"), 1, "Happened has no field hwo; it has subject_id, how"),
        (("--set", "how=7"), 1, "how: Input should be a valid string"),
        (("--set", "how"), 2, "is no FIELD=VALUE"),
        (("--set", "how=x", "--payload-file", "-"), 2, "either --set or --payload-file"),
        (("--payload-file", "/nowhere"), 2, "cannot read /nowhere"),
        ((), 2, "set $EDITOR"),
    ],
)
def test_what_cannot_be_done_is_refused(
    outbox: Outbox, rows: Rows, dead: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    for name in ("VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)
    ran = outbox("dead-letters", "edit", "1", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert len(ran.err.splitlines()) == 1
    assert says in ran.err
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution IS NULL") == "1"


@pytest.mark.parametrize("how", ['"7"', "well"])
def test_a_value_is_json_or_text(outbox: Outbox, rows: Rows, dead: str, how: str) -> None:
    assert outbox("dead-letters", "edit", "1", "--set", f"how={how}").code == 0
    assert rows.sql("SELECT payload ->> 'how' FROM outbox_message") == how.strip('"')


def test_the_whole_payload_comes_from_stdin(outbox: Outbox, rows: Rows, dead: str) -> None:
    answer = json.dumps({"subject_id": _SUBJECT})
    ran = outbox("dead-letters", "edit", "1", "--payload-file", "-", "--json", answer=answer)
    assert ran.json["fields"] == ["how"]
    assert ran.json["message_id"] == str(delivery_id(event_of(UUID(dead)), MAX_CONSUMERS))
    assert rows.sql("SELECT payload ->> 'how' FROM outbox_message") == ""
    rows.dead_letter()
    for text, says in (("[]", "a payload is a JSON object"), ("{", "this is no JSON")):
        assert says in outbox("dead-letters", "edit", "2", "--payload-file", "-", answer=text).err


def test_an_editor_opens_it_as_often_as_it_takes(
    outbox: Outbox, rows: Rows, dead: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _editor(tmp_path, monkeypatch, 'how">hwo"', '"hwo": "die">"how": "well"')
    ran = outbox("dead-letters", "edit", "1", answer="\n")
    assert ran.code == 0, ran.err
    assert "Happened has no field hwo" in ran.err
    assert rows.sql("SELECT payload ->> 'how' FROM outbox_message") == "well"


def test_an_editor_that_changes_nothing_does_nothing(
    outbox: Outbox, rows: Rows, dead: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _editor(tmp_path, monkeypatch, "die>die", 'how">hwo"')
    ran = outbox("dead-letters", "edit", "1")
    assert (ran.code, "nothing was changed" in ran.err) == (1, True)
    ran = outbox("dead-letters", "edit", "1", answer="n\n")
    assert (ran.code, ran.out) == (1, "")
    monkeypatch.setenv("EDITOR", "/nowhere/vi")
    assert "cannot run the editor" in outbox("dead-letters", "edit", "1").err
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution IS NULL") == "1"
