"""The tree of errors at the top of `service/errors.py` is the whole tree, and the right one."""

from __future__ import annotations

import importlib
import pkgutil
import re
from typing import TYPE_CHECKING

import relay
import service
from service import errors
from service.outbox import Fail, Retry
from service.outbox.consumers import Postpone

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINE = re.compile(r"^ {4}(?P<indent>[│ ]*)[├└]── (?P<name>\w+) +(?:(?P<module>(?:service|relay)\.[\w.]+): )?\w", re.M)

_STEER = {Retry, Fail, Postpone}


def _drawn() -> set[tuple[str, str, str]]:
    """Name, base and module of each."""
    drawn, above = set(), ["ServiceError"]
    for line in _LINE.finditer(errors.__doc__ or ""):
        depth = len(line["indent"]) // 4 + 1
        above[depth:] = [line["name"]]
        drawn.add((line["name"], above[depth - 1], line["module"] or errors.__name__))
    return drawn


def _defined() -> Iterator[type[BaseException]]:
    """Every exception class that another module may see."""
    for package in (service, relay):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__") or found.name.startswith("service.domains."):
                continue  # these run a program, and those are each domain's own
            for each in vars(importlib.import_module(found.name)).values():
                if not isinstance(each, type) or not issubclass(each, BaseException):
                    continue
                if each.__module__ == found.name and not each.__name__.startswith("_") and each not in _STEER:
                    yield each


def test_the_tree_is_drawn_as_it_is() -> None:
    actual = {(each.__name__, each.__bases__[0].__name__, each.__module__) for each in _defined()}
    assert actual - {("ServiceError", "Exception", "service.errors")} == _drawn()
