"""The changelog is kept by towncrier: its entries are files in `.changes/`, until a version is made of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

CHANGELOG = "CHANGELOG.md"

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
    pytest.mark.skipif(not (ROOT / CHANGELOG).exists(), reason="this project keeps no changelog"),
]


class _Branch:
    """A branch of a project that has nothing but its changelog."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        who = {f"GIT_{role}_{what}": "somebody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self._environment = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")} | who
        for name in ("pyproject.toml", CHANGELOG):
            shutil.copy(ROOT / name, folder)
        self.run("git", "init", "-q", "-b", "main")
        self.commit()
        self.run("git", "switch", "-q", "-c", "branch")
        shutil.copytree(ROOT / ".changes", folder / ".changes")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)

    def commit(self) -> None:
        assert self.run("git", "add", "-A").returncode == 0
        assert self.run("git", "commit", "-qm", "Change").returncode == 0

    def towncrier(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "towncrier", *arguments)


@pytest.fixture
def branch(tmp_path: Path) -> _Branch:
    return _Branch(tmp_path)


@pytest.mark.parametrize(("entry", "right"), [("+coupons.added.md", True), ("+coupons.new.md", False)])
def test_every_entry_is_of_a_kind_that_there_is(branch: _Branch, entry: str, right: bool) -> None:
    """Those in `.changes/` now, and one more."""
    (branch.folder / ".changes" / entry).write_text("Coupons.\n")
    branch.commit()
    checked = branch.towncrier("check", "--compare-with", "main")
    assert (checked.returncode == 0) is right, checked.stdout + checked.stderr


def test_a_version_takes_the_entries_and_leaves_what_was_there(branch: _Branch) -> None:
    before = (branch.folder / CHANGELOG).read_text().partition("release notes start -->\n")[2]
    made = branch.towncrier("create", "+coupons.added.md", "--content", "Coupons.")
    assert made.returncode == 0, made.stderr
    branch.commit()
    built = branch.towncrier("build", "--version", "99.0.0", "--yes")
    assert built.returncode == 0, built.stderr
    after = (branch.folder / CHANGELOG).read_text().partition("release notes start -->\n")[2]
    assert re.match(r"\n## [\w-]+ 99\.0\.0 \(\d{4}-\d\d-\d\d\)\n", after)
    assert "\n- Coupons.\n" in after
    assert after.endswith(before)
    assert [each.name for each in (branch.folder / ".changes").iterdir()] == [".gitignore"]


def test_it_has_a_section_for_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sections = re.findall(r"^## \S+ (\S+) \(", (ROOT / CHANGELOG).read_text(), re.MULTILINE)
    assert version in sections, "`towncrier build` makes one"
