"""The benchmark itself runs, checks what it counts, and writes it down; what it finds is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT
from tests.proof.bench.__main__ import _give_up, _status
from tests.proof.bench.figures import Figure, summary, table
from tests.proof.bench.sections import Result
from tests.servers.real_servers import outside_environment
from tests.waiting import InVainError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    command = [sys.executable, "-m", "tests.proof.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=outside_environment(), capture_output=True, text=True, timeout=280)


def test_a_quick_run_measures_and_writes_down(tmp_path: Path) -> None:
    done = bench("--quick", "--only", "relay", "--out", str(tmp_path))
    assert done.returncode in (0, 1, 3), done.stderr
    assert done.stdout.splitlines()[-1].startswith(("everything", "slower", "could not"))
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


@pytest.mark.parametrize(("ours", "verdict"), [([80.0, 90.0, 100.0], "ok"), ([10.0, 79.0, 79.0], "MISSED")])
def test_a_ratio_is_that_of_the_medians(ours: list[float], verdict: str) -> None:
    figure = Figure("drain", "rows/s", ours, "loop", [99.0, 100.0, 500.0], at_least=0.8)
    assert table([figure]).splitlines()[-1].endswith(verdict)


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (Figure("drain", "rows/s", [70.0, 79.0], "loop", [100.0, 100.0], at_least=0.8), "MISSED"),
        (Figure("drain", "rows/s", [50.0, 90.0], "loop", [100.0, 100.0], at_least=0.8), "NOISY"),
        (Figure("wait", "ms", [11.0, 12.0, 30.0], at_most=10), "MISSED"),
        (Figure("wait", "ms", [9.0, 12.0, 30.0], at_most=10), "NOISY"),
        (Figure("wait", "ms", [9.0, 9.0, 30.0], at_most=10), "ok"),
        (Figure("wait", "ms", [21.0, 22.0], "none", [9.0, 10.0], at_most_times=2), "MISSED"),
        (Figure("wait", "ms", [19.0, 22.0], "none", [9.0, 10.0], at_most_times=2), "NOISY"),
        (Figure("wait", "ms", [15.0, 22.0], "none", [9.0, 10.0], at_most_times=2), "ok"),
    ],
)
def test_runs_that_differ_too_much_are_no_verdict(figure: Figure, verdict: str) -> None:
    assert figure.verdict == verdict
    (line,) = summary([figure], [], [])
    begins = {"ok": "everything", "MISSED": "slower than the claim: ", "NOISY": "could not be measured: "}
    assert line.startswith(begins[verdict])
    assert figure.name in line or verdict == "ok"
    assert _status(Result([figure])) == {"ok": 0, "MISSED": 1, "NOISY": 3}[verdict]


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (InVainError("waited 60 s in vain"), "could not be measured: api (InVainError: waited 60 s in vain)", 3),
        (ChildProcessError("relay ended"), "could not be measured: api (ChildProcessError: relay ended)", 3),
        (ExceptionGroup("several", [TimeoutError()]), "could not be measured: api (TimeoutError: )", 3),
        (AssertionError("7 of 8 rows"), "does not add up: api (AssertionError: 7 of 8 rows)", 1),
    ],
)
def test_a_section_that_fails_is_named_with_its_reason(error: Exception, line: str, status: int) -> None:
    result = Result()
    _give_up(result, "api", error)
    assert summary(result.figures, result.unmeasured, result.wrong) == [line]
    assert _status(result) == status
