"""Tables a person can read at 80 columns, ages, and JSON.

What must stay true: nothing reaches stdout or stderr around `line`, `note` and `print_json`, so that no character from
outside can steer the terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from textwrap import indent
from typing import TYPE_CHECKING, Any
from uuid import UUID

from service.errors import ServiceError
from service.text import visible, visible_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence


class ReaderGoneError(ServiceError):
    """Whoever read the output had enough of it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column; one with a `least` width gives way when the table is wider than the terminal."""

    header: str
    right: bool = False
    least: int | None = None


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, gap: int = 2) -> str:
    """Lay out rows under their headers, within the width of the terminal."""
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(column.header), *(len(row[i]) for row in cells), 0) for i, column in enumerate(columns)]
    surplus = sum(widths) + gap * (len(columns) - 1) - screen_width()
    while surplus > 0:
        room = [(widths[i] - column.least, i) for i, column in enumerate(columns) if column.least is not None]
        most, widest = max(room, default=(0, 0))
        if most <= 0:
            break
        widths[widest] -= 1
        surplus -= 1
    lines = []
    for row in [[column.header for column in columns], *cells]:
        padded = [
            cut(cell, width).rjust(width) if column.right else cut(cell, width).ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        lines.append((" " * gap).join(padded).rstrip())
    return "\n".join(lines)


def screen_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def plain(text: str) -> str:
    """Text on one line, with an escape for each character that could steer a terminal."""
    return visible(text.replace("\n", " ").replace("\t", " "))


def cut(text: str, width: int) -> str:
    """At most `width` characters, with an ellipsis where something is missing."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def compact(number: int | None) -> str:
    """A count in at most six characters; `-` when it is not known."""
    if number is None:
        return "-"
    for limit, unit in ((1_000_000, "M"), (100_000, "k")):
        if number >= limit:
            scaled = number / (1_000_000 if unit == "M" else 1_000)
            return f"{scaled:.1f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{number:,}"


def age(span: timedelta | float | None) -> str:
    """A duration as a person says it: `0s`, `42s`, `5m`, `3h`, `12d`; `-` when there is none."""
    return "-" if span is None else rounded(span, "s", "m", "h", "d")


def rounded(span: timedelta | float, seconds: str, minutes: str, hours: str, days: str) -> str:
    """A duration in the one of these units that suits it."""
    length = abs(span.total_seconds() if isinstance(span, timedelta) else span)
    for unit, size, limit in ((seconds, 1, 120), (minutes, 60, 7_200), (hours, 3_600, 172_800)):
        if length < limit:
            return f"{length / size:.0f}{unit}"
    return f"{length / 86_400:.0f}{days}"


def timestamp(moment: datetime | None) -> str:
    """A time in UTC, to the second."""
    return "-" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}Z"


def print_json(value: Any) -> None:
    """Write a value as JSON on stdout: times in ISO 8601, durations in seconds."""
    line(_json(value))


async def print_json_list(head: dict[str, Any], name: str, items: AsyncIterable[Any]) -> None:
    """Write the object `head` with a list under `name`, which need not fit into memory."""
    line(f'{_json(head).removesuffix("}").rstrip()},\n  "{name}": [')
    held = ""
    async for item in items:
        if held:
            line(f"{held},")
        held = indent(_json(item), "    ")
    line(f"{held}\n  ]\n}}" if held else "  ]\n}")


def _json(value: Any) -> str:
    return visible_json(json.dumps(value, default=_jsonable, indent=2, ensure_ascii=False))


def _jsonable(value: Any) -> Any:
    match value:
        case datetime() | date():
            return value.isoformat()
        case timedelta():
            return round(value.total_seconds(), 3)
        case UUID():
            return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def line(text: str = "") -> None:
    """The command's result.

    Raises:
        ReaderGoneError: when nobody reads it any more, as after `| head`.
    """
    try:
        sys.stdout.write(visible(text, keep="\n") + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError from None


def note(text: str) -> None:
    """Something for the person at the terminal that is not part of the result."""
    sys.stderr.write(visible(text, keep="\n") + "\n")
    sys.stderr.flush()


def error(text: str) -> None:
    """The one line that says what went wrong and what to do."""
    note(f"outbox: {plain(text)}")
