"""The pages in `docs/` hang together: links, diagrams, and an index that leads to each of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT
from tests.service.docs.pages import (
    ALL,
    BACKUPS,
    CHANGING,
    CONSUMERS,
    DEPLOYS,
    DEVELOPING,
    DOCS,
    EXISTING_SERVICE,
    FIRST_FEATURE,
    GUIDE,
    IN_ORDER,
    LATER_VERSIONS,
    METRICS,
    OPERATIONS,
    RECIPES,
    RUNNING,
    TRACES,
    blocks,
    missing,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LONGER = {"first-feature.md", "settings.md", "speed.md"}

_TRIED = {
    "python": (*GUIDE, DOCS / "an-order.md", TRACES),
    "sh": (FIRST_FEATURE, DOCS / "packages.md", DOCS / "console.md"),
    "bash": (LATER_VERSIONS, EXISTING_SERVICE),
    "ini": (EXISTING_SERVICE, DOCS / "production.md", DOCS / "console.md"),
    "sql": (CHANGING, RECIPES, RUNNING, BACKUPS, DOCS / "personal-data.md"),
    "console": (
        *(FIRST_FEATURE, CONSUMERS, IN_ORDER),
        *(DOCS / f"{name}.md" for name in ("an-order", "doctor", "console")),
        *OPERATIONS,
    ),
    "text": (DEVELOPING, TRACES),
    "mermaid": ALL,
    "promql": (METRICS,),
    "yaml": (DEPLOYS,),
}
"""Where a test runs or reads the blocks of a language."""

_MAKE = re.compile(r"(?:`|^ *\$ )make ([a-z]+)", re.MULTILINE)

pages = pytest.mark.parametrize("page", ALL, ids=lambda page: page.name)


@pages
def test_what_it_names_and_links_to_is_there(page: Path) -> None:
    assert missing(page) == []


def test_the_page_in_the_domains_folder_leads_here() -> None:
    page = ROOT / "service" / "domains" / "README.md"
    assert missing(page) == []
    assert len(page.read_text().splitlines()) <= 10


@pages
def test_it_is_short(page: Path) -> None:
    assert page.name in _LONGER or len(page.read_text().splitlines()) <= 200


@pages
def test_it_has_one_title_and_is_in_the_index(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^# .", text, re.MULTILINE)) == 1
    assert page.name == "README.md" or f"]({page.name})" in (DOCS / "README.md").read_text()


@pages
def test_each_block_ends_and_says_what_it_is(page: Path) -> None:
    text = page.read_text()
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert fences[1::2] == [""] * (len(fences) // 2)
    assert all(page in _TRIED.get(language, ()) for language in fences[::2])
    commands = set(re.findall(r"^ *\$ (\S+)", text, re.MULTILINE))
    assert commands <= {"outbox", "dramatiq", "make", "curl", ".venv/bin/outbox"}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_knows_what_the_pages_say() -> None:
    listed = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    known = set(re.findall(r"^  make ([a-z]+) ", listed, re.MULTILINE)) | {"demo", "chaos", "bench"}  # may be deleted
    said = {target for page in ALL for target in _MAKE.findall(page.read_text())}
    assert said
    assert said <= known


def test_the_log_lines_that_the_pages_name_are_logged() -> None:
    code = "\n".join(file.read_text() for folder in ("service", "relay") for file in (ROOT / folder).rglob("*.py"))
    logged = set(re.findall(r"_?log(?:\(\w*\)|ger\(__name__\))?\.\w+\(\s*\"([a-z]+\.[a-z_]+)\"", code))
    assert "outbox.dead_lettered" in logged
    for page in ALL:
        named = set(
            re.findall(r"`((?:relay|worker|outbox|broker|database|log)\.[a-z]+(?:_[a-z]+)*)`", page.read_text())
        )
        assert named <= logged, page


# Enough of Mermaid's grammar to notice what would be shown as an error in place of the picture.


def _sequence(lines: list[str]) -> None:
    declared = {match[1] for line in lines if (match := re.match(r"(?:participant|actor) (\w+)( as .+)?$", line))}
    for line in lines:
        if re.match(r"(?:participant|actor) \w", line):
            continue
        sent = re.fullmatch(r"(\w+)(?:->>|-->>)(\w+): \S.*", line)
        noted = re.fullmatch(r"Note (?:over|left of|right of) (\w+)(?:,(\w+))?: \S.*", line)
        found = sent or noted
        assert found, line
        assert {name for name in found.groups() if name} <= declared, line


def _states(lines: list[str]) -> None:
    for line in lines:
        assert re.fullmatch(r"(?:\[\*\]|\w+) --> (?:\[\*\]|\w+)(?:: [^:]+)?", line), line


def _flow(lines: list[str]) -> None:
    node = r"(\w+)(?:\[\([^][(){}|\"]+\)\]|\(\[[^][(){}|\"]+\]\)|\[[^][(){}|\"]+\])?"
    for line in lines:
        assert re.fullmatch(rf"{node} -->(?:\|[^|\"()\[\]]+\|)? {node}|{node}|subgraph \w+ \[[^][()]+\]|end", line), (
            line
        )
    assert sum(line.startswith("subgraph") for line in lines) == lines.count("end")


def _gantt(lines: list[str]) -> None:
    assert "dateFormat X" in lines
    for line in lines:
        if re.match(r"(?:title|dateFormat|axisFormat|section) \S", line):
            continue
        task = re.fullmatch(r"[^:]+ :(?:milestone, )?(\d+), (\d+)", line)
        assert task, line
        assert int(task[1]) <= int(task[2]), line


_KINDS: dict[str, Callable[[list[str]], None]] = {
    "sequenceDiagram": _sequence,
    "stateDiagram-v2": _states,
    "flowchart LR": _flow,
    "flowchart TD": _flow,
    "gantt": _gantt,
}


@pages
def test_its_diagrams_can_be_drawn(page: Path) -> None:
    for block in blocks(page, language="mermaid"):
        kind, *lines = (line.strip() for line in block.text.splitlines() if line.strip())
        assert not re.search(r"[;#]", block.text), "both mean something in Mermaid"
        assert lines
        _KINDS[kind](lines)


def test_there_are_diagrams() -> None:
    drawn = {block.text.split()[0] for block in blocks(*ALL, language="mermaid")}
    assert {"stateDiagram-v2", "sequenceDiagram", "flowchart", "gantt"} <= drawn


def test_the_tests_that_the_pages_name_exist() -> None:
    if not (ROOT / "tests" / "proof" / "__init__.py").exists():
        pytest.skip("this project has deleted the proof")
    code = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in ALL for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) >= 10
    assert [name for name in named if f"def {name}(" not in code] == []
