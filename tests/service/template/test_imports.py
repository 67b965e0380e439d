"""What tests may import: each folder of theirs can be moved or deleted without breaking another one."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

from service.dev.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TESTS = ROOT / "tests"


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, and what it names as modules in its strings, as commands of processes do."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.ImportFrom(module=str(module)):
                yield module
                yield from (f"{module}.{each.name}" for each in node.names)
            case ast.Import():
                yield from (each.name for each in node.names)
            case ast.Constant(value=str(text)):
                yield text


def found(prefixes: tuple[str, ...], *, beside: str) -> list[str]:
    """Where files outside the folder `beside` import what begins with one of the prefixes."""
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(TESTS.rglob("*.py"))
        if not path.is_relative_to(TESTS / beside)
        for name in imported(path)
        if name.startswith(prefixes)
    ]


def test_nothing_needs_the_proof() -> None:
    """Whoever does not change the kernel may delete it."""
    assert not found(("tests" + ".proof",), beside="proof")
    assert not found(("tests" + ".domains",), beside="domains")


def test_no_test_is_imported() -> None:
    assert not [each for each in found(("tests.",), beside="none") if ".test_" in each.partition(": ")[2]]
