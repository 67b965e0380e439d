"""Migrations go up, down and up again, say what the models say, and fail in one line where they are not to blame."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy.engine import make_url

import service.domains
from service.database.base import Base
from service.dev.places import ROOT, postgres_binaries
from service.dev.postgres import psql

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.slow

TABLES = """
SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class
WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
"""
SCHEMA = f"""
SELECT ({TABLES}), (SELECT string_agg(version_num, ' ' ORDER BY version_num) FROM alembic_version)
"""
CONSTRAINTS = """
SELECT conrelid::regclass, conname FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
WHERE relnamespace = 'public'::regnamespace AND contype NOT IN ('n', 't')
"""
RENAMED = """
ALTER TABLE dead_letter RENAME CONSTRAINT ck_dead_letter_ck_dead_letter_resolved TO ck_dead_letter_resolved
"""
"""As in a project whose metadata has no naming convention."""
FUNCTIONS = "SELECT count(*) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"


def _alembic(environment: Mapping[str, str], *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=cwd, env=dict(environment), capture_output=True, text=True)


def _done(environment: Mapping[str, str], *arguments: str, cwd: Path = ROOT) -> str:
    done = _alembic(environment, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def _refusal(environment: Mapping[str, str], *arguments: str) -> str:
    done = _alembic(environment, *arguments)
    assert done.returncode != 0
    [line] = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert line.startswith("FAILED: ")
    return line


def _scripts() -> ScriptDirectory:
    folder = ROOT / "migrations"
    return ScriptDirectory(str(folder), version_locations=[str(folder / name) for name in ("ledger", "domains")])


def test_down_to_nothing_and_up_again(environment: dict[str, str], database_url: str) -> None:
    tables = psql(database_url, TABLES)
    assert "outbox_message" in tables.split()
    _done(environment, "-x", "ledger=down", "downgrade", "base")
    assert psql(database_url, TABLES) == "alembic_version"
    assert psql(database_url, FUNCTIONS) == "0"
    _done(environment, "upgrade", "heads")
    assert psql(database_url, TABLES) == tables


def test_each_branch_goes_down_without_the_other(environment: dict[str, str], database_url: str) -> None:
    scripts = _scripts()
    for branch, other in (("ledger", "domains"), ("domains", "ledger")):
        _done(environment, "-x", "ledger=down", "downgrade", f"{branch}@base")
        left = psql(database_url, "SELECT version_num FROM alembic_version")
        assert [left] == [each.revision for each in scripts.get_revisions(f"{other}@head")]
        _done(environment, "upgrade", f"{branch}@head")


@pytest.mark.parametrize("destination", ["base", "ledger@-1", "ledger@base", "ledger_0001"])
def test_the_ledger_goes_down_only_when_it_is_told_to(
    environment: dict[str, str], database_url: str, destination: str
) -> None:
    before = psql(database_url, SCHEMA)
    said = _refusal(environment, "downgrade", destination)
    assert f"alembic -x ledger=down downgrade {destination}" in said
    assert psql(database_url, SCHEMA) == before


def test_down_by_a_number_must_name_its_branch(environment: dict[str, str], database_url: str) -> None:
    before = psql(database_url, SCHEMA)
    for number in ("-1", "-2"):
        assert f"alembic downgrade domains@{number}" in _refusal(environment, "downgrade", number)
    assert psql(database_url, SCHEMA) == before


def test_constraints_have_the_names_that_the_models_say(environment: dict[str, str], database_url: str) -> None:
    service.domains.discover()
    said = {
        (table.name, str(constraint.name))
        for table in Base.metadata.tables.values()
        for constraint in table.constraints
    }
    found = {tuple(line.split("|")) for line in psql(database_url, CONSTRAINTS).splitlines()}
    assert {each for each in found if each[0] in Base.metadata.tables} == said
    _done(environment, "-x", "ledger=down", "downgrade", "ledger@base")
    _done(environment, "upgrade", "ledger_0002")
    doubled = psql(database_url, CONSTRAINTS)
    assert "ck_outbox_message_ck_outbox_message_state" in doubled
    psql(database_url, RENAMED)
    _done(environment, "upgrade", "heads")
    assert {tuple(line.split("|")) for line in psql(database_url, CONSTRAINTS).splitlines()} == found


def test_the_models_say_what_the_migrations_say(environment: dict[str, str], database_url: str) -> None:
    assert "No new upgrade operations detected" in _done(environment, "check")
    psql(database_url, "ALTER TABLE dead_letter ALTER reason DROP NOT NULL")
    assert _alembic(environment, "check").returncode != 0


def test_files_are_dated_and_on_one_of_the_two_branches() -> None:
    revisions = list(_scripts().walk_revisions())
    assert {label for each in revisions for label in each.branch_labels} == {"ledger", "domains"}
    for each in revisions:
        path = ROOT / each.path
        assert re.fullmatch(r"20\d\d_[01]\d_[0-3]\d_[a-z0-9_]+\.py", path.name), path
        assert path.parent.name in each.branch_labels, f"{path} is on the other branch"
        assert not each.dependencies, f"{path}: the branches go up and down without each other"


def test_a_database_of_other_code_is_one_line(environment: dict[str, str], database_url: str) -> None:
    [domains] = _scripts().get_revisions("domains@head")
    psql(database_url, f"UPDATE alembic_version SET version_num = 'gone_0007' WHERE version_num = '{domains.revision}'")
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
        said = _refusal(environment, "-x", "ledger=down", "downgrade", "ledger@base")
        holder.kill()
    assert "try again" in said
    assert "outbox_message" in psql(database_url, TABLES)


_MIGRATION = """
import sqlalchemy as sa
from alembic import op
revision, down_revision, branch_labels, depends_on = {revision!r}, {after!r}, None, None
def upgrade(): op.add_column({table!r}, sa.Column({revision!r}, sa.Integer()))
def downgrade(): op.drop_column({table!r}, {revision!r})
"""


def test_the_next_ledger_does_not_meet_migrations_of_domains(
    environment: dict[str, str], database_url: str, tmp_path: Path
) -> None:
    """A clone has migrations of its own, the template's next version brings one, and the clone makes another."""
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    psql(database_url, "CREATE TABLE mine (id int)")
    [ledger], [domains] = (_scripts().get_revisions(f"{branch}@head") for branch in ("ledger", "domains"))
    for revision, after, branch, table in (
        ("mine_1", domains.revision, "domains", "mine"),
        ("next_1", ledger.revision, "ledger", "dead_letter"),
        ("mine_2", "mine_1", "domains", "mine"),
    ):
        file = tmp_path / "migrations" / branch / f"2099_01_01_{revision}.py"
        file.write_text(_MIGRATION.format(revision=revision, after=after, table=table))
        _done(environment, "upgrade", "heads", cwd=tmp_path)
    assert set(psql(database_url, "SELECT version_num FROM alembic_version").split()) == {"mine_2", "next_1"}
    _done(environment, "downgrade", "domains@-2", cwd=tmp_path)
    assert set(psql(database_url, "SELECT version_num FROM alembic_version").split()) == {domains.revision, "next_1"}
