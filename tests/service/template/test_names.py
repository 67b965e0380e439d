"""One name per thing: a file, or a class or other type, that is looked for by its name is found in one place.

The parts of a domain are called alike in every domain, so they are left out.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from typing import TYPE_CHECKING

from service.dev.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _modules() -> Iterator[Path]:
    for package in ("service", "relay"):
        for path in (ROOT / package).rglob("*.py"):
            if not path.name.startswith("__") and "domains" not in path.parts:
                yield path.relative_to(ROOT)


def _named_twice(named: Iterator[tuple[str, Path]]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for name, path in named:
        places[name].append(str(path))
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_two_modules_have_the_same_file_name() -> None:
    assert _named_twice((path.name, path) for path in _modules()) == {}


def _names(statements: list[ast.stmt]) -> set[str]:
    """The names of classes, and of what is assigned: constants are told by their capitals, and are not looked for."""
    found = set()
    for each in statements:
        match each:
            case ast.ClassDef(name) | ast.Assign([ast.Name(name)]) | ast.AnnAssign(ast.Name(name)):
                found.add(name)
            case ast.If():
                found |= _names(each.body) | _names(each.orelse)
    return {name for name in found if name[0].isupper() and not name.isupper()}


def test_no_two_public_types_have_the_same_name() -> None:
    parsed = ((path, ast.parse((ROOT / path).read_text())) for path in _modules())
    assert _named_twice((name, path) for path, module in parsed for name in _names(module.body)) == {}
