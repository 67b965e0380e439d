"""The figures in `docs/speed.md` are those of `docs/bench/bench.json`."""

from __future__ import annotations

import json

from service.dev.places import ROOT
from tests.proof.bench.speed_table import BEGIN, END, SPEED, speed_table


def test_the_page_has_every_figure() -> None:
    table = SPEED.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert table == speed_table(), "run: .venv/bin/python -m tests.proof.bench.speed_table"


def test_the_page_says_when_that_was() -> None:
    measured = json.loads((ROOT / "docs" / "bench" / "bench.json").read_text())["machine"]["at"]
    assert f"the medians of {measured}," in SPEED.read_text()
