"""The project's pages, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["GUIDE", "OPERATIONS", "README", "Block", "blocks"]

README = ROOT / "README.md"
GUIDE = ROOT / "service" / "domains" / "README.md"
OPERATIONS = ROOT / "relay" / "README.md"

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


def blocks(page: Path, language: str = "") -> list[Block]:
    """The blocks of a page in order, or those in one language."""
    found = [Block(*match.groups()) for match in _BLOCK.finditer(page.read_text())]
    return [block for block in found if language in ("", block.language)]
