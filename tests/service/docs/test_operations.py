"""What the pages for operators say: their commands run as they stand, and the table has every setting."""

from __future__ import annotations

import asyncio
import io
import re
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import asyncpg
import pytest
from ruamel.yaml import YAML

from relay.cli.app import main
from service.dev.places import ROOT
from service.dev.postgres import psql
from service.ledger import statistics
from service.ledger.ids import delivery_id, new_event_id
from service.ledger.presence import Presence
from service.ledger.statistics import Histogram, Key, Runs
from service.settings import DatabaseSettings, OutboxSettings
from service.telemetry import probe
from service.telemetry.loop_lag import LoopLag
from tests.service.docs.pages import (
    ALL,
    BACKUPS,
    DELIVERY,
    DEPLOYS,
    DOCS,
    OPERATIONS,
    README,
    RUNNING,
    SETTINGS,
    blocks,
    text_of,
)
from tests.service.docs.settings_table import BEGIN, END, settings_table

if TYPE_CHECKING:
    from pathlib import Path

_DEAD_LETTER = """
INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, attempts,
                         dispatches, created_at, errors, reason)
VALUES ('{id}', '{event_id}', 'order.confirmed', 1, 'orders.send_confirmation', 'email', '{{}}', '{{}}', 1, 1,
        clock_timestamp(), '[{{"type": "MailRefusedError", "message": "{message}"}}]', 'failed 9 times')
"""

_SCHEDULE = """
INSERT INTO outbox_schedule (name, declared, event_type, version, payload, cron, tz, catch_up, queue, next_at)
VALUES ('review.digest_due', true, 'review.digest_due', 1, '{}', '0 3 * * *', 'Europe/Berlin', 'latest', 'email', now())
"""

_MESSAGES = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, created_at)
SELECT gen_random_uuid(), gen_random_uuid(), 'order.confirmed', 1, 'orders.send_confirmation', queue, '{}', '{}',
       '2026-01-01'
FROM unnest(ARRAY['email', 'stock']) AS queue
"""

# What a command of the pages may end with, where that is not 0.
_ENDS = {"outbox status --fail-if": 1}
if not (ROOT / "service" / "domains" / "orders" / "__init__.py").exists():
    _ENDS["outbox dead-letters edit"] = (
        1  # what was corrected is checked by its consumer, which is gone with the example
    )


def _commands() -> list[str]:
    return re.findall(r"^ *\$ (outbox .*)$", text_of(*OPERATIONS, README), re.MULTILINE)


@pytest.fixture
def dead_letters(database_url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Four dead letters, numbered from 1, a schedule, and the environment of the command; the first one's event id."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    events = [new_event_id() for _ in range(4)]
    for event_id, message in zip(events, ("451 later", "550 no such user", "451 later", "no order"), strict=True):
        letter = _DEAD_LETTER.format(id=delivery_id(event_id, 1), event_id=event_id, message=message)
        psql(database_url, letter)
    psql(database_url, _SCHEDULE)
    return str(events[0])


def test_the_commands_run_in_their_order(
    dead_letters: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = _commands()
    assert len(commands) >= 15
    for command in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command.replace("EVENT_ID", dead_letters))[1:])
        expected = next((code for start, code in _ENDS.items() if command.startswith(start)), 0)
        assert int(ended.value.code or 0) == expected, f"{command}\n{capsys.readouterr()}"


def test_deliveries_in_doubt_can_be_declared_done(database_url: str) -> None:
    [statement] = [block.text for block in blocks(BACKUPS, language="sql")]
    psql(database_url, _MESSAGES)
    psql(database_url, statement)
    open_ = psql(database_url, "SELECT queue FROM outbox_message WHERE state <> 'completed'")
    assert open_.split() == ["stock"]


def test_old_records_can_be_deleted(dead_letters: str, database_url: str) -> None:
    [statement] = [block.text for block in blocks(DOCS / "personal-data.md", language="sql")]
    psql(database_url, "UPDATE dead_letter SET resolution = 'discarded', resolved_at = now() WHERE id < 3")
    psql(database_url, "ALTER TABLE dead_letter DISABLE TRIGGER ALL")
    psql(database_url, "UPDATE dead_letter SET resolved_at = '2020-01-01' WHERE id = 1")
    psql(database_url, "ALTER TABLE dead_letter ENABLE TRIGGER ALL")
    psql(database_url, statement)
    assert psql(database_url, "SELECT id FROM dead_letter ORDER BY id").split() == ["2", "3", "4"]


def test_who_runs_and_what_ran_is_shown(database_url: str) -> None:
    async def report() -> None:
        connection = await asyncpg.connect(database_url)
        two = Runs(2, Histogram(3.0))
        await statistics.add(connection, {Key("stock", "orders.reserve_stock", "completed"): two})
        await Presence("relay", "1f3a", LoopLag(1)).tell(connection)
        await connection.close()

    asyncio.run(report())
    [statements] = [block.text for block in blocks(RUNNING, language="sql")]
    processes, minutes = (psql(database_url, each) for each in statements.strip().split(";\n\n"))
    assert re.match(r"relay\|.+\|1f3a\|0\|", processes)
    assert minutes.endswith("|orders.reserve_stock|completed|2|1.5")


@pytest.mark.parametrize("probe_of", ["livenessProbe", "readinessProbe"])
def test_the_probes_run_and_fail_where_nothing_runs(probe_of: str, tmp_path: Path) -> None:
    [block] = blocks(DEPLOYS, language="yaml")
    described = YAML(typ="safe", pure=True).load(block.text)[probe_of]
    program, *arguments = described["exec"]["command"]
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], env={"PROBE_FOLDER": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, f"no process shows itself in {tmp_path}\n")
    assert described["periodSeconds"] * 3 > probe.PATIENCE, "it is asked three times before it counts"


def test_the_table_has_every_setting() -> None:
    table = SETTINGS.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table == settings_table(), "run: .venv/bin/python -m tests.service.docs.settings_table"


@pytest.mark.parametrize(
    ("page", "sentence", "value"),
    [
        (
            DELIVERY,
            "handed over again after 60, 120, 240 and then every 480 seconds",
            OutboxSettings().redispatch_after == 60,
        ),
        (DELIVERY, "the end of the lease, 30 s after", OutboxSettings().lease == 30),
        (DEPLOYS, "OUTBOX__SHUTDOWN_GRACE (20 s)  <  --worker-shutdown-timeout", OutboxSettings().shutdown_grace == 20),
        (RUNNING, "`DATABASE__POOL_SIZE` (10)", DatabaseSettings.model_fields["pool_size"].default == 10),
        (RUNNING, "`OUTBOX__KEEP_COMPLETED` (7 days)", OutboxSettings().keep_completed == 7 * 86_400),
        (DEPLOYS, "`OUTBOX__UNKNOWN_CONSUMER_AFTER`", OutboxSettings().unknown_consumer_after == 86_400),
    ],
)
def test_the_figures_are_those_of_the_settings(page: Path, sentence: str, value: bool) -> None:
    assert value, sentence
    assert sentence in page.read_text()


def test_every_variable_that_a_page_names_exists() -> None:
    known = set(re.findall(r"`([A-Z_]+)` \|", settings_table()))
    assert {"DATABASE__URL", "OUTBOX__LEASE"} <= known
    for page in (*ALL, README):
        named = set(re.findall(r"\b(?:DATABASE|BROKER|OUTBOX|API|SMTP)__[A-Z_]*[A-Z]\b", page.read_text()))
        assert named <= known, page
