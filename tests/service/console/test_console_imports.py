"""The console stands on the ledger, beside the service."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

from service.console.rendering import HERE
from service.dev.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_FOREIGN = ("service.outbox", "service.domains", "service.identity", "service.mail", "dramatiq", "redis", "sqlalchemy")

_NEEDED = {("payload_pages.py", "service.domains"), ("payload_pages.py", "service.outbox.corrections")}
"""A payload that a person edits is checked against the class of its event; nothing else knows the domains."""


def _imported() -> Iterator[tuple[str, str]]:
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Import():
                    yield from ((path.name, each.name) for each in node.names)
                case ast.ImportFrom(module=str(module)):
                    yield from ((path.name, f"{module}.{each.name}") for each in node.names)


def test_nothing_imports_it() -> None:
    """Else it could not be taken out."""
    ours = (HERE, Path(__file__).parent)
    importing = re.compile(r"^\s*(?:from|import) (?:service|tests\.service)\.console\b", re.MULTILINE)
    sources = (file for folder in ("service", "relay", "tests", "migrations") for file in (ROOT / folder).rglob("*.py"))
    assert [f"{each}" for each in sources if each.parent not in ours and importing.search(each.read_text())] == []


def test_it_knows_neither_domains_nor_workers() -> None:
    found = {(name, module) for name, module in _imported() if module.startswith(_FOREIGN)}
    assert found == _NEEDED
