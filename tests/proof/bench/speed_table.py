"""The figures in `docs/speed.md`, written from `docs/bench/bench.json` by `python -m tests.proof.bench.speed_table`."""

from __future__ import annotations

import json
import re
from typing import Any

from service.dev.places import ROOT

__all__ = ["BEGIN", "END", "SPEED", "speed_table"]

BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
SPEED = ROOT / "docs" / "speed.md"


def speed_table() -> str:
    """One row for each figure."""
    document = json.loads((ROOT / "docs" / "bench" / "bench.json").read_text())
    head = ["| figure | median | compared with | median | ratio | to reach |", "|---|---:|---|---:|---:|---|"]
    return "\n".join([*head, *(_row(each) for each in document["figures"])])


def _row(figure: dict[str, Any]) -> str:
    ratio = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
    against = "" if figure["ratio"] is None else _number(figure["median"] / figure["ratio"])
    cells = (figure["name"], f"{_number(figure['median'])} {figure['unit']}", figure["versus"], against, ratio)
    return re.sub(" +", " ", f"| {' | '.join(cells)} | {_target(figure)} |")


def _target(figure: dict[str, Any]) -> str:
    if figure["at_least"] is not None:
        return f"≥ {figure['at_least']:g}"
    if figure.get("at_most_times") is not None:
        return f"≤ {figure['at_most_times']:g} times"
    return f"≤ {figure['at_most']:g}" if figure["at_most"] is not None else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    page = SPEED.read_text()
    section = f"{BEGIN}\n\n{speed_table()}\n\n{END}"
    SPEED.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, page, flags=re.DOTALL))
