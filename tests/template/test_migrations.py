"""Migrations go up, down and up again, say what the models say, and fail in one line where they are not to blame."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy.engine import make_url

from service.dev.places import ROOT, postgres_binaries
from service.dev.postgres import psql

if TYPE_CHECKING:
    from collections.abc import Mapping

TABLES = """
SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
FUNCTIONS = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"


def _alembic(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True)


def _done(environment: Mapping[str, str], *arguments: str) -> str:
    done = _alembic(environment, *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def _refusal(environment: Mapping[str, str], *arguments: str) -> str:
    done = _alembic(environment, *arguments)
    assert done.returncode != 0
    [line] = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert line.startswith("FAILED: ")
    return line


def test_down_to_nothing_and_up_again(environment: dict[str, str], database_url: str) -> None:
    tables = psql(database_url, TABLES)
    assert "outbox_message" in tables.split()
    _done(environment, "downgrade", "base")
    assert psql(database_url, TABLES) == "alembic_version"
    assert psql(database_url, FUNCTIONS) == "0"
    _done(environment, "upgrade", "heads")
    assert psql(database_url, TABLES) == tables


def test_each_branch_goes_down_without_the_other(environment: dict[str, str], database_url: str) -> None:
    for branch, other in (("ledger", "domains"), ("domains", "ledger")):
        _done(environment, "downgrade", f"{branch}@base")
        assert psql(database_url, "SELECT version_num FROM alembic_version").startswith(other)
        _done(environment, "upgrade", f"{branch}@head")


def test_the_models_say_what_the_migrations_say(environment: dict[str, str], database_url: str) -> None:
    assert "No new upgrade operations detected" in _done(environment, "check")
    psql(database_url, "ALTER TABLE dead_letter ALTER reason DROP NOT NULL")
    assert _alembic(environment, "check").returncode != 0


def test_files_are_dated_and_on_one_of_the_two_branches() -> None:
    scripts = ScriptDirectory(
        str(ROOT / "migrations"), version_locations=[str(ROOT / "migrations" / name) for name in ("ledger", "domains")]
    )
    revisions = list(scripts.walk_revisions())
    assert {label for each in revisions for label in each.branch_labels} == {"ledger", "domains"}
    for each in revisions:
        path = ROOT / each.path
        assert re.fullmatch(r"20\d\d_[01]\d_[0-3]\d_[a-z0-9_]+\.py", path.name), path
        assert path.parent.name in each.branch_labels, f"{path} is on the other branch"
        assert not each.dependencies, f"{path}: the branches go up and down without each other"


def test_a_database_of_other_code_is_one_line(environment: dict[str, str], database_url: str) -> None:
    psql(database_url, "UPDATE alembic_version SET version_num = 'gone_0007' WHERE version_num LIKE 'domains%'")
    for arguments in (["upgrade", "heads"], ["downgrade", "base"], ["check"]):
        said = _refusal(environment, *arguments)
        assert "Can't locate revision identified by 'gone_0007'" in said
        assert "make reset" in said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"username": "nobody_knows"}, 'role "nobody_knows" does not exist'),
        ({"host": "127.0.0.1", "port": 1, "query": {}, "password": "secret"}, "Connect call failed"),
    ],
)
def test_no_way_to_the_database_is_one_line(
    environment: dict[str, str], database_url: str, change: dict[str, Any], reason: str
) -> None:
    url = make_url(database_url).set(**change)
    environment["DATABASE__URL"] = url.render_as_string(hide_password=False)
    said = _refusal(environment, "upgrade", "heads")
    assert reason in said
    assert "DATABASE__URL" in said
    assert "secret" not in said


def test_a_missing_setting_is_one_line(environment: dict[str, str]) -> None:
    del environment["DATABASE__URL"]
    assert "DATABASE__URL: is not set" in _refusal(environment, "upgrade", "heads")


def test_a_lock_that_is_held_is_waited_for_shortly(environment: dict[str, str], database_url: str) -> None:
    statements = ("BEGIN", "LOCK TABLE outbox_message", "SELECT 1", "SELECT pg_sleep(60)")
    command = [str(postgres_binaries() / "psql"), "-XAtq", *(part for each in statements for part in ("-c", each))]
    with subprocess.Popen([*command, database_url], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "1"
        said = _refusal(environment, "downgrade", "ledger@base")
        holder.kill()
    assert "try again" in said
    assert "outbox_message" in psql(database_url, TABLES)
