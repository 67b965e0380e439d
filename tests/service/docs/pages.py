"""The project's pages, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ALL",
    "BACKUPS",
    "CHANGING",
    "CONSUMERS",
    "DELIVERY",
    "DEPLOYS",
    "DEVELOPING",
    "DOCS",
    "EXISTING_SERVICE",
    "FIRST_FEATURE",
    "GUIDE",
    "IN_ORDER",
    "LATER_VERSIONS",
    "METRICS",
    "MOVING",
    "OPERATIONS",
    "README",
    "RECIPES",
    "RUNNING",
    "SCHEDULES",
    "SETTINGS",
    "TRACES",
    "Block",
    "blocks",
    "missing",
    "stripped",
    "text_of",
]

README = ROOT / "README.md"
DOCS = ROOT / "docs"
DELIVERY, DEVELOPING, RUNNING, DEPLOYS, BACKUPS, SETTINGS = (
    DOCS / f"{name}.md" for name in ("delivery", "developing", "running", "deploys", "backups", "settings")
)
FIRST_FEATURE, CONSUMERS, RECIPES, IN_ORDER, HANDLERS, CALLERS, CHANGING, LATER_VERSIONS, MOVING, EXISTING_SERVICE = (
    DOCS / f"{name}.md"
    for name in (
        "first-feature", "consumers", "recipes", "in-order", "handlers", "who-is-calling", "changing", "later-versions",
        "moving",
        "existing-service",
    )
)  # fmt: skip
METRICS = DOCS / "metrics.md"
SCHEDULES = DOCS / "schedules.md"
LIMITS = DOCS / "limits.md"
BATCHES = DOCS / "batches.md"
TRACES = DOCS / "traces.md"

GUIDE = (
    FIRST_FEATURE, CONSUMERS, RECIPES, BATCHES, IN_ORDER, LIMITS, HANDLERS, CALLERS, SCHEDULES, CHANGING, SETTINGS,
    LATER_VERSIONS,
    MOVING,
    EXISTING_SERVICE,
)  # fmt: skip
"""What a developer reads, in the order in which its code goes together."""

OPERATIONS = (
    RUNNING,
    LIMITS,
    *(DOCS / f"{name}.md" for name in ("alerts", "dead-letters", "personal-data", "brokers")),
    DEPLOYS,
    BACKUPS,
    DOCS / "speed.md",
    SCHEDULES,
    SETTINGS,
    DELIVERY,
)
"""What an operator reads."""

ALL = tuple(sorted(DOCS.glob("*.md")))

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block. `title` is its first line, without the comment's sign, where that is a comment."""

    language: str
    text: str

    @property
    def title(self) -> str:
        first = self.text.partition("\n")[0]
        return first.removeprefix("# ") if first.startswith("# ") else ""


def text_of(*pages: Path) -> str:
    """The pages, one after the other."""
    return "\n".join(page.read_text() for page in pages)


def blocks(*pages: Path, language: str = "") -> list[Block]:
    """The blocks of some pages in order, or those in one language."""
    found = [Block(*match.groups()) for match in _BLOCK.finditer(text_of(*pages))]
    return [block for block in found if language in ("", block.language)]


def missing(page: Path) -> list[str]:
    """What a page names between backticks or links to, and is not there: paths, pages, and headings of pages."""
    text = page.read_text()
    named = re.findall(r"`((?:service|relay|migrations|tests|docs)/[\w./]*\w/?)`", text)
    wrong = [path for path in named if not _there(ROOT / path)]
    for path, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        target = page.parent / path if path else page
        if not _there(target) or (heading and target.exists() and heading not in _headings(target)):
            wrong.append(f"{path}#{heading}")
    return wrong


_BUILT = tuple(ROOT / "service" / "domains" / name for name in ("reviews", "customers"))
"""What the reader of a page makes."""

_OF_THE_EXAMPLE = ("docs/an-order.md", "service/dev/demo", "service/domains/orders", "tests/domains/orders")

_OF_THE_CONSOLE = ("service/console", "tests/service/console", "docs/console.md", "docs/console")

_OF_THE_MONITORING = ("service/dev/board.py", "tests/service/monitoring", "tests/servers/prometheus.py")


def _there(path: Path) -> bool:
    """Whether it exists, or is what a user may have deleted: the example, the proof, the monitoring or the console."""
    path = path.resolve()
    deleted = [ROOT / name for name in ("tests/proof", "docs/monitoring", *_OF_THE_CONSOLE)]
    if not (ROOT / "docs" / "monitoring").exists():
        deleted += [ROOT / name for name in _OF_THE_MONITORING]
    if not _left(ROOT / "service" / "domains" / "orders"):
        deleted += [ROOT / name for name in _OF_THE_EXAMPLE]
    return path.exists() or any(
        path.is_relative_to(each) for each in (*_BUILT, *(each for each in deleted if not _left(each)))
    )


def _left(path: Path) -> bool:
    """Whether it exists: of a package that was deleted the byte code stays behind."""
    return path.is_file() or any(each.is_file() and each.suffix != ".pyc" for each in path.rglob("*"))


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def stripped() -> str:
    """What the README's strip line removes."""
    [line] = blocks(README, language="sh")
    return line.text
