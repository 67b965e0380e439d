"""Whatever stands in the rows, nothing but text reaches the terminal, and JSON still says what stands there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from service.text import visible, visible_json
from tests.proof.cli.conftest import json_literal

if TYPE_CHECKING:
    from tests.proof.cli.conftest import Outbox, Rows

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202egnp\u2066\u200b\u2028\ufeff\x7f\r\nforged ä 🙂 \U000e0041"
_TEXT = "E'" + EVIL.replace("\r", r"\r").replace("\n", r"\n") + "'"
_ERROR = {"at": "2026-01-02T03:04:06+00:00", "attempt": EVIL, "type": EVIL, "message": EVIL, "traceback": EVIL}
_DEAD = {
    "consumer": _TEXT,
    "queue": _TEXT,
    "event_type": _TEXT,
    "payload": json_literal({EVIL: EVIL}),
    "headers": json_literal({"tracestate": EVIL}),
    "errors": json_literal([_ERROR]),
    "reason": _TEXT,
}
_WAITING = {
    **{name: _DEAD[name] for name in ("consumer", "queue", "event_type", "payload", "headers")},
    "errors": json_literal([_ERROR | {"attempt": 1}]),
}


def _lines(text: str) -> list[str]:
    lines = text.removesuffix("\n").split("\n")
    for line in lines:
        assert line.isprintable(), line
        assert not line.startswith("forged"), lines
    return lines


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_every_command_shows_text_and_nothing_else(outbox: Outbox, rows: Rows, form: list[str]) -> None:
    rows.dead_letter(2, **_DEAD)
    rows.dead_letter(1, resolution="'discarded'", resolved_at="now()", resolved_by=_TEXT, resolved_why=_TEXT, **_DEAD)
    unclaimed = {"state": "'dispatched'", "dispatches": "9", "attempts": "0"}
    (delivery_id,) = rows.message(1, 1, None, **unclaimed, **_WAITING)
    rows.sql(f"INSERT INTO paused_queue (queue, paused_by, why) VALUES ({_TEXT}, {_TEXT}, {_TEXT})")
    for command in (
        ["status"],
        ["queues", "list"],
        ["queues", "pause", "email", "--by", EVIL],
        ["queues", "resume", EVIL],
        ["queues", "resume", "--all"],
        ["dead-letters", "list", "--state", "any"],
        ["dead-letters", "show", "1"],
        ["dead-letters", "show", "3"],
        ["dead-letters", "show", EVIL],
        ["dead-letters", "replay", "3"],
        ["dead-letters", "replay", "--all"],
        ["dead-letters", "list", "--state", EVIL],
        ["events", "show", str(delivery_id)],
        ["events", "show", EVIL],
        ["events", "list"],
        ["events", "list", "--state", EVIL],
        ["purge", "--older-than", EVIL],
        [EVIL],
    ):
        ran = outbox(*command, *form)
        assert _lines(ran.out + ran.err) != [""], command


def test_json_says_what_stands_there(outbox: Outbox, rows: Rows) -> None:
    rows.dead_letter(1, **_DEAD)
    shown = outbox("dead-letters", "show", "1", "--json")
    listed = outbox("dead-letters", "list", "--json").json["dead_letters"]
    for row in (shown.json, *listed):
        assert (row["reason"], row["payload"], row["errors"][0]["message"]) == (EVIL, {EVIL: EVIL}, EVIL)
    assert "ä 🙂" in shown.out


def test_a_lone_surrogate_is_visible_too() -> None:
    assert visible("a\udc9b", keep="\n") == r"a\udc9b"
    document = json.dumps({"a": "\ud800 \U000e0041"}, ensure_ascii=False)
    assert visible_json(document).isascii()
    assert json.loads(visible_json(document)) == json.loads(document)


_LOG = """
import logging, sys
from service.telemetry.logs import configure_logging, get_logger
evil = sys.argv[1]
class Odd:
    __repr__ = lambda self: evil
configure_logging("console", "INFO")
get_logger("a").info("some.event", text=evil, odd=Odd(), listed=[evil], exception=evil, **{evil: 1})
try:
    raise ValueError(evil)
except ValueError:
    get_logger("b").exception(evil)
    logging.getLogger("uvicorn.error").exception("failed: %s", evil, stack_info=True)
"""


def test_the_console_log_shows_text_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", _LOG, EVIL], capture_output=True, text=True, errors="strict")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.removesuffix("\n").split("\n")
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert sum("some.event" in line for line in lines) == 1
    assert done.stderr.count("ValueError: a\\x1b[2J") == 2
