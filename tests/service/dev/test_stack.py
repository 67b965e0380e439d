"""The stack: whose URL wins, one `make dev` at a time, and advice where a database cannot be migrated."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from service.dev import places, stack, up
from service.dev.places import ROOT, ServerError
from service.dev.postgres import psql

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.slow


@pytest.fixture
def clone(server_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty clone to keep data and `.env` in."""
    monkeypatch.setattr(places, "ROOT", server_folder)
    monkeypatch.setattr(stack, "ROOT", server_folder)
    return server_folder


def test_the_environment_wins_over_the_env_file(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (clone / ".env").write_text("DATABASE__URL=postgresql://a/b\nOUTBOX__LEASE=5\nBROKER__URL=\n")
    monkeypatch.setenv("OUTBOX__LEASE", "7")
    given = stack.configured()
    assert given["DATABASE__URL"] == "postgresql://a/b"
    assert given["OUTBOX__LEASE"] == "7"
    assert "BROKER__URL" not in given


def test_each_url_wins_over_its_embedded_server_on_its_own(clone: Path) -> None:
    given = {"DATABASE__URL": "postgresql://mine/db", "PATH": os.environ["PATH"]}
    with stack.embedded_servers(given, clone, lasting=False) as environment:
        assert environment["DATABASE__URL"] == "postgresql://mine/db"
        assert environment["BROKER__URL"].startswith("unix://")
    assert not (clone / "postgres").exists()
    given = {"BROKER__URL": "redis://mine/0"}
    with stack.embedded_servers(given, clone, lasting=False) as environment:
        assert environment["BROKER__URL"] == "redis://mine/0"
        assert psql(environment["DATABASE__URL"], "SELECT 1") == "1"


def test_data_of_the_stack_survives_a_restart(clone: Path) -> None:
    with stack.embedded_servers({}, clone, lasting=True) as environment:
        psql(environment["DATABASE__URL"], "CREATE TABLE here (id int)")
    with stack.embedded_servers({}, clone, lasting=True) as environment:
        assert psql(environment["DATABASE__URL"], "SELECT count(*) FROM here") == "0"


def test_the_latest_migration_of_the_domains_is_undone(environment: dict[str, str], database_url: str) -> None:
    versions = "SELECT version_num FROM alembic_version ORDER BY 1"
    before = psql(database_url, versions).split()
    stack.undo(environment)
    after = psql(database_url, versions).split()
    assert [each for each in after if each.startswith("ledger")] == [
        each for each in before if each.startswith("ledger")
    ]
    assert after != before
    psql(database_url, "DELETE FROM alembic_version WHERE version_num LIKE 'domains%'")
    with pytest.raises(ServerError, match="nothing was undone"):
        stack.undo(environment)


def test_a_second_stack_is_refused_and_finds_the_first(clone: Path) -> None:
    with stack.clone_lock() as first:
        assert first
        stack.note_running({"DATABASE__URL": "postgresql://running/db"})
        with stack.clone_lock() as second:
            assert not second
        with pytest.raises(ServerError, match="runs already"):
            up.run()
        with stack.clone_servers() as environment:
            assert environment["DATABASE__URL"] == "postgresql://running/db"
    with stack.clone_lock() as again:
        assert again


def test_a_database_of_other_code_leads_to_make_reset(database_url: str, environment: dict[str, str]) -> None:
    psql(database_url, "UPDATE alembic_version SET version_num = 'gone_0007' WHERE version_num LIKE 'domains%'")
    psql(database_url, "INSERT INTO alembic_version VALUES ('gone_0007') ON CONFLICT DO NOTHING")
    with pytest.raises(ServerError, match="migration gone_0007, which this checkout no longer has") as refused:
        stack.migrate(environment)
    assert "make reset" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_database_that_cannot_be_reached_is_one_line(environment: dict[str, str]) -> None:
    environment["DATABASE__URL"] = "postgresql://postgres:secret@127.0.0.1:1/none"
    with pytest.raises(ServerError, match="migrating failed") as refused:
        stack.migrate(environment)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_reset_does_not_delete_without_being_told(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = places.clone_data() / "postgres"
    kept.mkdir()
    monkeypatch.delenv("YES", raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert up.reset() == 1
    assert kept.exists()
    monkeypatch.setenv("YES", "1")
    assert up.reset() == 0
    assert not kept.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["env"], "DATABASE__URL and BROKER__URL are not set"), (["migration", " "], "say what it does")],
)
def test_commands_say_what_is_missing(server_folder: Path, arguments: list[str], says: str) -> None:
    code = f"places.ROOT = stack.ROOT = Path({str(server_folder)!r})\nsys.exit(main())"
    imports = "import sys; from pathlib import Path; from service.dev import places, stack"
    run = f"{imports}; from service.dev.__main__ import main\n{code}"
    done = subprocess.run([sys.executable, "-c", run, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
