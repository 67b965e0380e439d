"""What was measured, beside what it is compared with and what it has to reach."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Figure", "as_document", "summary", "table"]


@dataclass(frozen=True)
class Figure:
    """One line of the result.

    Attributes:
        name: What was measured.
        unit: Of `ours` and `against`.
        ours: A value a repetition.
        versus: What it is compared with.
        against: A value a repetition, taken in turns with `ours`; empty where the figure stands for itself.
        at_least: Least ratio of the medians that is good enough.
        at_most_times: Greatest ratio of the medians that is good enough.
        at_most: Greatest median of `ours` that is good enough.
        note: What the reader has to know.
    """

    name: str
    unit: str
    ours: list[float]
    versus: str = ""
    against: list[float] = field(default_factory=list)
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    at_most_times: float | None = None

    @property
    def value(self) -> float:
        """The median of ours."""
        return statistics.median(self.ours)

    @property
    def ratio(self) -> float | None:
        """Median by median."""
        return self.value / statistics.median(self.against) if self.against else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; `None` without one."""
        if self.at_least is not None and self.ratio is not None:
            return self.ratio >= self.at_least
        if self.at_most_times is not None and self.ratio is not None:
            return self.ratio <= self.at_most_times
        if self.at_most is not None:
            return self.value <= self.at_most
        return None

    @property
    def verdict(self) -> str:
        """ "ok"; "MISSED" where no two runs reach the target; "NOISY" where it depends on which runs one compares."""
        if self.met is not False:
            return "ok" if self.met else ""
        if self.at_least is not None:
            return "NOISY" if max(self.ours) / min(self.against) >= self.at_least else "MISSED"
        if self.at_most_times is not None:
            return "NOISY" if min(self.ours) / max(self.against) <= self.at_most_times else "MISSED"
        return "NOISY" if self.at_most is not None and min(self.ours) <= self.at_most else "MISSED"

    @property
    def target(self) -> str:
        """As it is shown."""
        if self.at_least is not None:
            return f">= {self.at_least:g} x"
        if self.at_most_times is not None:
            return f"<= {self.at_most_times:g} x"
        return f"<= {self.at_most:g}" if self.at_most is not None else ""


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    middle = _number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))}..{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(figures: list[Figure]) -> str:
    """The figures as aligned text."""
    rows = [("figure", "unit", "median (min..max)", "compared with", "median (min..max)", "ratio", "to reach", "")]
    for each in figures:
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        rows.append(
            (
                each.name,
                each.unit,
                _spread(each.ours),
                each.versus,
                _spread(each.against),
                ratio,
                each.target,
                each.verdict,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(figures: list[Figure], unmeasured: list[str], wrong: list[str]) -> list[str]:
    """What fell short, by name: the last lines of the output."""
    noisy = [f"{_title(each)} (its runs differ too much)" for each in figures if each.verdict == "NOISY"]
    kinds = {
        "does not add up": wrong,
        "could not be measured": unmeasured + noisy,
        "slower than the claim": [_title(each) for each in figures if each.verdict == "MISSED"],
    }
    lines = [f"{kind}: {name}" for kind, names in kinds.items() for name in names]
    return lines or ["everything reaches what it has to"]


def _title(figure: Figure) -> str:
    return f"{figure.name}, against {figure.versus}" if figure.versus else figure.name


def as_document(figures: list[Figure]) -> list[dict[str, Any]]:
    """The figures for JSON."""
    return [
        asdict(each) | {"median": each.value, "ratio": each.ratio, "met": each.met, "verdict": each.verdict}
        for each in figures
    ]
