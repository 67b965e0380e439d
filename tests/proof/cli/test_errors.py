"""Whatever is wrong, there is one line on stderr that says what to do, an exit code, and no password."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from service.dev.postgres import psql
from tests.proof.cli.conftest import COMMAND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.proof.cli.conftest import Outbox, Rows
    from tests.servers.real_servers import Where

    Start = Callable[[Sequence[str]], subprocess.Popen[str]]

_COMMANDS = [
    ("dead-letters", "list"),
    ("dead-letters", "show", "1"),
    ("dead-letters", "replay", "--all", "--yes"),
    ("dead-letters", "discard", "1"),
    ("events", "list"),
    ("events", "show", "01937e5c-8a4e-7cc0-98c4-dc0c0c073900"),
    ("queues", "list"),
    ("queues", "pause", "email"),
    ("queues", "resume", "email"),
    ("purge",),
]


def _one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.startswith("outbox: ")
    assert len(text.splitlines()) == 1
    assert "secret" not in text
    return text


def test_postgresql_is_down(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://ann:secret@127.0.0.1:1/shop")
    for command in _COMMANDS:
        ran = outbox(*command)
        assert (ran.code, ran.out) == (3, ""), command
        assert "cannot reach PostgreSQL at 127.0.0.1:1/shop" in _one_line(ran.err)


def test_the_database_is_not_migrated(outbox: Outbox, rows: Rows) -> None:
    rows.sql("DROP TABLE outbox_message, dead_letter, paused_queue CASCADE")
    for command in _COMMANDS:
        ran = outbox(*command)
        assert (ran.code, ran.out) == (3, ""), command
        assert "alembic upgrade heads" in _one_line(ran.err)


def test_status_of_an_unmigrated_database(outbox: Outbox, rows: Rows) -> None:
    rows.sql("DROP TABLE outbox_message CASCADE")
    ran = outbox("status")
    assert ran.code == 3
    assert "alembic upgrade heads" in ran.out


def test_the_database_does_not_exist(outbox: Outbox, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", database_url.replace("/test_", "/no_test_"))
    ran = outbox("dead-letters", "list")
    assert ran.code == 3
    assert "PostgreSQL has no database" in _one_line(ran.err)


def test_the_host_does_not_exist(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://ann:secret@nowhere.invalid/shop")
    ran = outbox("dead-letters", "list")
    assert ran.code == 3
    assert "nowhere.invalid:5432/shop" in _one_line(ran.err)


def test_the_role_may_not(outbox: Outbox, servers: Where, database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    psql(servers.postgres, "DROP ROLE IF EXISTS cli_reader")
    psql(servers.postgres, "CREATE ROLE cli_reader LOGIN")
    monkeypatch.setenv("DATABASE__URL", database_url.replace("postgres@", "cli_reader@"))
    ran = outbox("dead-letters", "list")
    psql(servers.postgres, "DROP ROLE cli_reader")
    assert ran.code == 3
    assert "the role 'cli_reader' may not do this" in _one_line(ran.err)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DATABASE__URL", "mysql://ann:secret@host/shop", "DATABASE__URL: expected postgresql://"),
        ("DATABASE__URL", "ann:secret", "DATABASE__URL: expected postgresql://"),
        ("DATABASE__URL", "postgresql://ann:secret@host:port/shop", "DATABASE__URL"),
        ("DATABASE__URL", None, "DATABASE__URL: is not set"),
        ("BROKER__URL", "http://ann:secret@host", "BROKER__URL: expected redis://"),
        ("BROKER__URL", None, "BROKER__URL: is not set"),
        ("OUTBOX__KEEP_COMPLETED", "a week", "OUTBOX__KEEP_COMPLETED"),
    ],
)
def test_a_setting_is_wrong(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, says: str
) -> None:
    outbox("--help")
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    for command in (*_COMMANDS, ("status",), ("relay",)):
        ran = outbox(*command)
        assert (ran.code, ran.out) == (2, "")
        assert says in _one_line(ran.err)


def test_wrong_usage_names_the_help(outbox: Outbox) -> None:
    for arguments in ("statsu", "--verbose", "dead-letters shwo", "dead-letters show", "status --watch=1"):
        ran = outbox(*arguments.split())
        assert (ran.code, ran.out) == (2, ""), arguments
        assert "--help`" in _one_line(ran.err)


def test_help_fits_80_columns_and_documents_the_exit_codes(outbox: Outbox) -> None:
    for group in ("", "dead-letters", "dead-letters replay", "events", "events list", "queues", "status", "purge"):
        ran = outbox(*group.split(), "--help")
        assert ran.code == 0
        assert max(map(len, ran.out.splitlines())) <= 80, group
    described = [line.split()[0] for line in outbox("--help").out.splitlines() if line.strip()[:1].isdigit()]
    assert described == ["0", "1", "2", "3", "4", "130"]


def test_the_console_script_is_installed(environment: dict[str, str]) -> None:
    script = os.path.join(os.path.dirname(COMMAND[0]), "outbox")  # noqa: PTH118, PTH120
    done = subprocess.run([script, "dead-letters", "list"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "There are no open dead letters.\n", "")


def test_a_reader_that_had_enough_is_no_error(
    start: Start, rows: Rows, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.dead_letter(3_000)
    monkeypatch.delitem(environment, "PYTHONUNBUFFERED")  # or Python forgets the rest of a broken write
    process = start(["dead-letters", "list", "--limit", "3000"])
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 0


def test_an_interrupt_is_quiet(start: Start, rows: Rows, database_url: str) -> None:
    process = start(["status", "--watch", "--json"])
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(2)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 130
