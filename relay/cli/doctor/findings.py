"""What a check finds."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Level(StrEnum):
    """How bad it is. `unknown` is what could not be looked at, which is no failure."""

    OK = "ok"
    UNKNOWN = "unknown"
    ADVICE = "advice"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """What was looked at, what was seen, and what to do about it."""

    check: str
    level: Level
    seen: str
    cure: str = ""


def found(check: str, well: str, cases: Iterable[tuple[object, Level, str, str]]) -> list[Finding]:
    """A finding for each case whose first part is true, or one that all is well."""
    wrong = [Finding(check, level, seen, cure) for is_so, level, seen, cure in cases if is_so]
    return wrong or [Finding(check, Level.OK, well)]
