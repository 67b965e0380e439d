"""The locks pin what `pyproject.toml` allows, also after Dependabot, which raises a bound and leaves them alone."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

_PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


_DEV = ROOT / "requirements-dev.lock"
_PEERS = ROOT / "tests" / "proof" / "bench" / "requirements.in"


def _wanted(groups: list[str]) -> list[str]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["otel"]]
    for group in groups:
        lines += project["dependency-groups"][group]
    return lines


def _outside(lock: Path, wanted: list[str]) -> list[str]:
    """What is wanted, beside what is pinned, where that is not within its bounds."""
    pins = dict(_PIN.findall(lock.read_text()))
    outside = []
    for each in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(each.name))
        if pin is None or not each.specifier.contains(pin, prereleases=True):
            outside.append(f"{each}: {pin}")
    return outside


@pytest.mark.parametrize(("lock", "groups"), [("requirements.lock", []), ("requirements-dev.lock", ["dev"])])
def test_every_dependency_is_pinned_within_its_bounds(lock: str, groups: list[str]) -> None:
    assert not _outside(ROOT / lock, _wanted(groups)), "run `make lock`"


@pytest.mark.skipif(not _PEERS.exists(), reason="this project has no benchmark")
def test_what_the_benchmark_compares_with_is_pinned_within_its_bounds() -> None:
    wanted = [line for line in _PEERS.read_text().splitlines() if not line.startswith("#")]
    assert not _outside(_PEERS.with_suffix(".lock"), wanted), "run `make lock`"


@pytest.mark.skipif(not _PEERS.exists(), reason="this project has no benchmark")
def test_the_benchmark_moves_no_version_of_the_development() -> None:
    """Both are installed into one virtual environment."""
    ours, theirs = (dict(_PIN.findall(lock.read_text())) for lock in (_DEV, _PEERS.with_suffix(".lock")))
    assert {name: theirs[name] for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]} == {}
