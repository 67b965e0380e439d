"""The pages beside the README name what there is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_PAGES = [page for name in ("AGENTS.md", "CONTRIBUTING.md", "SECURITY.md") if (page := ROOT / name).exists()]
_PLACES = re.compile(r"`((?:\.changes|\.ci|migrations|relay|service|tests)/[\w./-]*)`")
# Whoever builds a service may delete it.
_PROOF = "tests/proof/"


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_what_it_names_is_there(page: Path) -> None:
    text = page.read_text()
    places = set(_PLACES.findall(text)) | set(re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text))
    assert places
    assert not [place for place in places if place != _PROOF and not (ROOT / place).exists()]


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_make_knows_what_it_says(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|\$ )make ([a-z]+)", page.read_text())) <= targets


def test_the_rules_fit_on_one_screen() -> None:
    agents = ROOT / "AGENTS.md"
    if not agents.exists():
        pytest.skip("this project has no such page")
    assert len(agents.read_text().splitlines()) <= 60


def test_the_changelog_s_heading_that_is_linked_exists() -> None:
    changelog, contributing = ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"
    if not (changelog.exists() and contributing.exists()):
        pytest.skip("this project has no such page")
    assert "(CONTRIBUTING.md#the-changelog)" in changelog.read_text()
    assert "\n## The changelog\n" in contributing.read_text()
