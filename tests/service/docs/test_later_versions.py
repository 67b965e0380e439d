"""A project that began as a copy takes the next version, with the commands of `docs/later-versions.md`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT
from tests.service.docs.pages import LATER_VERSIONS, blocks, stripped

if TYPE_CHECKING:
    from pathlib import Path

_NEWEST = "<!-- towncrier release notes start -->\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]

_FILES = ("pyproject.toml", "compose.yaml", "README.md", "Makefile", "CHANGELOG.md", ".gitattributes")
_LOCKS = ("requirements.lock", "requirements-dev.lock")


class _Git:
    """A repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def sh(self, script: str) -> str:
        parts = [f"GIT_{role}_{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
        who = dict.fromkeys(parts, "somebody@example.com") | {"TEMPLATE": "../template"}
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("GIT_", "MAKE"))}
        done = subprocess.run(["sh", "-ec", script], cwd=self.folder, env=outside | who, capture_output=True, text=True)
        self.failed = done.returncode != 0
        return done.stdout + done.stderr

    def done(self, script: str) -> str:
        said = self.sh(script)
        assert not self.failed, said
        return said

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        assert self.read(name).count(old) == 1, old
        self.write(name, self.read(name).replace(old, new))


def _commands() -> list[str]:
    """Name the template, join it, merge, settle, commit."""
    found = [block.text for block in blocks(LATER_VERSIONS, language="bash")]
    assert len(found) == 5
    return found


@pytest.fixture
def template(tmp_path: Path) -> _Git:
    made = _Git(tmp_path / "template")
    for name in ("service", "relay", "migrations", "docs", "tests"):
        shutil.copytree(ROOT / name, made.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*_FILES, *_LOCKS):
        shutil.copy(ROOT / name, made.folder)
    made.done("git init -q -b main && git add -A && git commit -qm One")
    made.write("relay/process/purge.py", "# the version that copies are made of\n")
    made.done("git add -A && git commit -qm Two")
    return made


def _copied(how: str, folder: Path) -> _Git:
    copy = _Git(folder)
    if how == "clone":
        copy.done("git clone -q ../template .")
    else:
        copy.done("git -C ../template archive main | tar -x && git init -q -b main && git add -A")
        copy.done("git commit -qm 'Initial commit'")
    return copy


def _make_it_ours(copy: _Git) -> None:
    copy.done(stripped())
    copy.write("README.md", "# Mine\n")
    copy.write("service/domains/mine/models.py", "\n")
    copy.edit("pyproject.toml", 'name = "outbox-service"', 'name = "my-shop"')
    copy.edit("pyproject.toml", '  "typer>', '  "humanize>=4",\n  "typer>')
    copy.edit("compose.yaml", '"-Q", "stock"]', '"-Q", "mine"]')
    copy.edit("CHANGELOG.md", _NEWEST, f"{_NEWEST}\n## my-shop 1.0.0 (2027-01-01)\n\n- Ours.\n")
    copy.write("service/mail.py", f"{copy.read('service/mail.py')}# ours\n")
    for lock in _LOCKS:
        copy.write(lock, f"{copy.read(lock)}humanize==4.0.0\n")
    copy.done("git add -A && git commit -qm Mine")


def _next_version(template: _Git) -> None:
    template.write("README.md", "# The next version\n")
    template.edit("pyproject.toml", '  "alembic>', '  "colorama>=0.4",\n  "alembic>')
    template.edit("compose.yaml", "image: rabbitmq:4", "image: rabbitmq:5")
    template.edit("CHANGELOG.md", _NEWEST, f"{_NEWEST}\n## outbox-service 0.2.0 (2027-01-02)\n\n- Theirs.\n")
    template.write("service/mail.py", f"# theirs\n{template.read('service/mail.py')}")
    template.done("git mv service/mail.py service/mailing.py")
    for lock in _LOCKS:
        template.write(lock, f"{template.read(lock)}sniffio==1.3.0\n")
    template.write("service/domains/orders/consumers.py", "# changed\n")
    template.write("service/domains/orders/more.py", "# new\n")
    template.write("relay/process/purge.py", "# mended\n")
    template.write("migrations/ledger/2027_01_01_next.py", "# next\n")
    template.done("git add -A && git commit -qm Three")


@pytest.mark.parametrize("how", ["clone", "use this template"])
def test_it_takes_the_next_version(template: _Git, tmp_path: Path, how: str) -> None:
    copy = _copied(how, tmp_path / "mine")
    _make_it_ours(copy)
    name, join, merge, settle, commit = _commands()
    copy.done(name)
    if how != "clone":
        copy.done(join)
        assert copy.done("git diff HEAD^ --stat") == ""
    _next_version(template)
    assert "CONFLICT" in copy.sh(merge)
    copy.done(stripped())
    copy.done(settle.replace("make lock\n", ""))
    copy.done(commit)

    assert copy.done("git status --short") == ""
    assert copy.read("README.md") == "# Mine\n"
    assert [folder.name for folder in (copy.folder / "service/domains").iterdir() if folder.is_dir()] == ["mine"]
    assert copy.read("relay/process/purge.py") == "# mended\n"
    assert (copy.folder / "migrations/ledger/2027_01_01_next.py").exists()
    assert all(each in copy.read("pyproject.toml") for each in ('"my-shop"', '"humanize>', '"colorama>'))
    assert all(each in copy.read("compose.yaml") for each in ('"-Q", "mine"]', "rabbitmq:5"))
    assert all(each in copy.read("CHANGELOG.md") for each in ("\n- Ours.\n", "\n- Theirs.\n", "service 0.1.0 ("))
    moved = copy.read("service/mailing.py")
    assert moved.startswith("# theirs\n")
    assert moved.endswith("# ours\n"), "a change of ours goes with a file that the template moved"
    assert "<<<<<<<" not in moved + copy.read("CHANGELOG.md")
    assert [copy.read(lock) for lock in _LOCKS] == [template.read(lock) for lock in _LOCKS]
    assert "Already up to date" in copy.done(merge)


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed: nothing tests what becomes of the locks")
def test_its_locks_are_the_template_s_and_what_is_its_own(template: _Git, tmp_path: Path) -> None:
    copy = _copied("clone", tmp_path / "mine")
    copy.edit("pyproject.toml", '  "typer>', '  "humanize>=4",\n  "typer>')
    said = copy.sh("make lock")
    if copy.failed and re.search(r"error sending request|Failed to fetch", said):
        pytest.skip("the package index cannot be reached: nothing tests what becomes of the locks")
    assert not copy.failed, said
    for lock in _LOCKS:
        pins, before = (set(re.findall(r"^[\w.-]+==\S+", each.read(lock), re.M)) for each in (copy, template))
        assert before < pins
        assert [re.split("==", pin)[0] for pin in pins - before] == ["humanize"]
