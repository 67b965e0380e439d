"""One name per thing: a file or a class that is looked for by its name is found in one place.

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


def test_no_two_public_classes_have_the_same_name() -> None:
    def classes() -> Iterator[tuple[str, Path]]:
        for path in _modules():
            for node in ast.parse((ROOT / path).read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield node.name, path

    assert _named_twice(classes()) == {}
