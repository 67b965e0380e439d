"""The pages for developers work as they stand: their steps are carried out in a copy of the project."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from dramatiq.cli import make_argument_parser

from service.dev.places import ROOT
from service.dev.postgres import psql
from tests.service.docs.pages import (
    CHANGING,
    EXISTING_SERVICE,
    GUIDE,
    LATER_VERSIONS,
    RECIPES,
    Block,
    blocks,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.real_servers import Where

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]

_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")

_HEAD = """\
from datetime import timedelta
from uuid import UUID
from fastapi import Response
from sqlalchemy import update
from service import mail
from service.http.request_session import Session
from service.domains.reviews.models import Review
from service.domains.reviews.routes import router
from service.outbox import Delivery, Event, Retry, consumer, publish, scheduled
"""

_CONSUMERS = """\
import service.domains
from service.outbox.consumers import registered_consumers
service.domains.discover()
service.domains.routers()
import service.domains.reviews.moved
print(*(spec.name for spec in registered_consumers()), *(kind.__name__ for kind in service.domains.settings()))
"""

_ROWS = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers, state,
                            completed_at)
SELECT gen_random_uuid(), gen_random_uuid(), 'review.submitted', 1, 'reviews.screen', 'reviews', '{}', '{}', state,
       CASE state WHEN 'completed' THEN now() END
FROM unnest(ARRAY['pending', 'dispatched', 'running', 'completed']) AS state
"""


_OUTER_RUN = ("PYTEST", "MAKE", "MARK", "ARGS")
"""Variables of the run that this test is part of."""


class Clone:
    """A copy of the project without any domain."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=_LEFT_OUT)
        for parent in (folder / "service" / "domains", folder / "tests" / "domains"):
            for domain in parent.iterdir():
                if domain.is_dir():
                    shutil.rmtree(domain)
        for migration in (folder / "migrations" / "domains").glob("*.py"):
            if not migration.stem.endswith("_start"):
                migration.unlink()
        self._installed = folder / "installed"
        for stamp in ("installed-packages", "installed"):  # in the order in which make makes them
            (folder / stamp).touch()
        # The nested run is no part of ours.
        self._environment = {key: value for key, value in environment.items() if not key.startswith(_OUTER_RUN)}

    def run(self, *command: str) -> str:
        """Run a command in the copy; what it printed."""
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def sh(self, script: str) -> str:
        """Run lines of a shell; `make` takes the packages that are installed here."""
        made = f'make() {{ command make VENV="{sys.prefix}" STAMP="{self._installed}" JOBS=0 "$@"; }}'
        return self.run("sh", "-ec", f"{made}\n{script}")

    def write(self, block: Block) -> None:
        """Make the file that a block's title names, or add to it."""
        file = self.folder / block.title.removeprefix("add to ")
        text = block.text.partition("\n")[2]
        file.write_text(file.read_text() + "\n\n" + text if block.title.startswith("add to ") else text)


@pytest.fixture
def clone(server_folder: Path, servers: Where, environment: dict[str, str]) -> Iterator[Clone]:
    name = f"guide_{uuid4().hex[:12]}"
    psql(servers.postgres, f'CREATE DATABASE "{name}"')
    empty = servers.postgres.replace("/postgres?", f"/{name}?")
    yield Clone(server_folder / "clone", environment | {"DATABASE__URL": empty})
    psql(servers.postgres, f'DROP DATABASE "{name}" WITH (FORCE)')


@pytest.mark.timeout(600)
def test_the_guide_works_as_it_stands(clone: Clone) -> None:
    ran = ""
    for block in blocks(*GUIDE):
        if block.language == "sh":
            ran += clone.sh(block.text)
        elif block.title.startswith(("service/", "tests/")):
            clone.write(block)
    assert "2 passed" in ran
    assert [file.name for file in (clone.folder / "migrations" / "domains").glob("*_add_reviews.py")]
    clone.run(sys.executable, "-m", "ruff", "check", "service/domains", "tests/domains", "migrations")
    clone.run(sys.executable, "-m", "ruff", "format", "--check", "service/domains", "tests/domains", "migrations")
    clone.run(str(Path(sys.executable).with_name("lint-imports")))
    for block in _of_the_guide():
        if block.title.startswith("add to "):
            clone.write(block)
    conftest = clone.folder / "tests" / "conftest.py"
    none, one = "DOMAIN_SETTINGS: dict[str, str] = {}", 'DOMAIN_SETTINGS = {"REVIEWS__LANGUAGE_KEY": "key"}'
    assert none in conftest.read_text()
    conftest.write_text(conftest.read_text().replace(none, one))
    assert "4 passed" in clone.sh("make test ARGS=tests/service/api/test_schemathesis.py")


def test_the_rest_of_the_code_can_be_imported(clone: Clone) -> None:
    clone.run("mkdir", "service/domains/reviews")
    clone.run("touch", "service/domains/reviews/__init__.py")
    moved = clone.folder / "service/domains/reviews/moved.py"
    moved.write_text(_HEAD)
    for block in _of_the_guide():
        if block.title.startswith("before"):
            compile(block.text, "before", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif block.title == "after":
            moved.write_text(moved.read_text() + block.text)
        elif "tests/" not in block.title:
            clone.write(block)
    names = clone.run(sys.executable, "-c", _CONSUMERS).split()
    expected = [
        "screen", "thank_author", "find_language", "render_card", "ask_moderator.on_dead", "praise", "send_digest",
        "remind_editor",
    ]  # fmt: skip
    assert {f"reviews.{name}" for name in expected} | {
        "moved.alert_moderators",
        "moved.resize",
        "moved.remind_authors",
        "ReviewSettings",
    } <= set(names)


def test_open_rows_can_be_moved_to_another_queue(database_url: str) -> None:
    [statement] = [block.text for block in blocks(CHANGING, language="sql")]
    psql(database_url, _ROWS)
    psql(database_url, statement)
    moved = psql(database_url, "SELECT state FROM outbox_message WHERE queue = 'screening' ORDER BY state")
    assert moved.split() == ["dispatched", "pending"]


def test_sql_publishes_what_the_page_says(database_url: str) -> None:
    [statement] = [block.text for block in blocks(RECIPES, language="sql")]
    event_id = psql(database_url, statement)
    found = psql(database_url, "SELECT event_id, event_type, queue, consumer FROM outbox_message")
    assert found == f"{event_id}|review.rating_changed|reviews|outbox.fan_out"


def test_the_workers_that_the_pages_start_can_be_started() -> None:
    """Together they serve every queue that the guide's consumers name."""
    parser = make_argument_parser()
    text = text_of(*GUIDE)
    lines = re.findall(r"^\$ dramatiq (.*)$", text, re.MULTILINE)
    served = [queue for line in lines for queue in parser.parse_args(shlex.split(line)).queues]
    named = re.findall(r'^@consumer\(Review\w+, queue="(\w+)"', text, re.MULTILINE)
    assert set(served) == set(named)
    assert len(set(served)) == len(served)


def test_no_block_is_of_a_kind_that_nothing_tries() -> None:
    assert {block.language for block in blocks(*GUIDE)} <= {"python", "sh", "bash", "ini", "console", "sql", "mermaid"}
    tried_elsewhere = {EXISTING_SERVICE, LATER_VERSIONS}
    assert not blocks(*(page for page in GUIDE if page not in tried_elsewhere), language="bash")
    kinds = ("service/", "tests/", "add to service/", "before: ", "after", "file service/", "in migrations/env.py")
    assert [block for block in blocks(*GUIDE, language="python") if not block.title.startswith(kinds)] == []


def _of_the_guide() -> list[Block]:
    """Without those for a service that was there before."""
    return [block for block in blocks(*GUIDE, language="python") if not block.title.startswith(("file ", "in "))]
