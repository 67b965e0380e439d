"""The benchmark itself runs, checks what it counts, and writes it down; what it finds is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT
from tests.bench.figures import Figure, table
from tests.real_servers import outside_environment

if TYPE_CHECKING:
    from pathlib import Path


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=outside_environment(), capture_output=True, text=True, timeout=110)


def test_a_quick_run_measures_and_writes_down(tmp_path: Path) -> None:
    done = bench("--quick", "--only", "relay", "--out", str(tmp_path))
    assert done.returncode in (0, 1), done.stderr
    document = json.loads((tmp_path / "bench.json").read_text())
    against = {figure["versus"]: figure for figure in document["figures"]}
    assert set(against) == {"loop of SELECT, enqueue, UPDATE", "its statement alone, no broker"}
    assert all(figure["ratio"] > 0 for figure in against.values())
    assert "relay drain" in done.stdout


def test_an_unknown_section_is_named() -> None:
    done = bench("--only", "relay,nonsense")
    assert done.returncode == 2
    assert "no section nonsense" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("ours", "verdict"), [([80.0, 90.0, 100.0], "ok"), ([10.0, 79.0, 200.0], "MISSED")])
def test_a_ratio_is_that_of_the_medians(ours: list[float], verdict: str) -> None:
    figure = Figure("drain", "rows/s", ours, "loop", [99.0, 100.0, 500.0], at_least=0.8)
    assert table([figure]).splitlines()[-1].endswith(verdict)
