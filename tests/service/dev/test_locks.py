"""The locks pin what `pyproject.toml` allows, also after Dependabot, which raises a bound and leaves them alone."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.dev.places import ROOT

_PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


def _wanted(groups: list[str]) -> list[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"]]
    for group in groups:
        lines += project["dependency-groups"][group]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize(
    ("lock", "groups"),
    [
        ("requirements.lock", []),
        ("requirements-dev.lock", ["dev"]),
        ("requirements-bench.lock", ["dev", "bench"]),
    ],
)
def test_every_dependency_is_pinned_within_its_bounds(lock: str, groups: list[str]) -> None:
    pins = dict(_PIN.findall((ROOT / lock).read_text()))
    outside = []
    for each in _wanted(groups):
        pin = pins.get(canonicalize_name(each.name))
        if pin is None or not each.specifier.contains(pin, prereleases=True):
            outside.append(f"{each}: {pin}")
    assert not outside, "run `make lock`"
