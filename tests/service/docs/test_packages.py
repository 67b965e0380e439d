"""`docs/packages.md` lists the licences of what is in the image, and names those that are not permissive."""

from __future__ import annotations

import re

import pytest

from service.dev.places import ROOT
from tests.service.docs.licences_table import BEGIN, END, PACKAGES, licences_table

_WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def _listed() -> list[tuple[str, str]]:
    return re.findall(r"^\| `([\w.-]+)` \| (.+) \|$", licences_table(), re.MULTILINE)


def test_every_package_has_its_licence() -> None:
    table = PACKAGES.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table == licences_table(), "run: .venv/bin/python -m tests.service.docs.licences_table"
    assert len(_listed()) > 30


def test_what_is_not_permissive_is_explained() -> None:
    known = re.compile(r"\b(MIT|BSD|Apache|PSF|ISC)\b")
    assert [name for name, licence in _listed() if not known.search(licence)] == ["certifi", "dramatiq"]


@pytest.mark.skipif(not _WORKFLOW.exists(), reason="this project has no workflow")
def test_every_action_has_the_digest_of_a_commit() -> None:
    used = re.findall(r"uses: (\S+)(.*)", _WORKFLOW.read_text())
    assert used
    for action, comment in used:
        assert re.search(r"@[0-9a-f]{40}$", action), action
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), "Dependabot writes the version that the digest is"
