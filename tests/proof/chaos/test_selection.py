"""A few scenarios of `make chaos`, short enough for every run of the tests; the rest is `make chaos` itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

import tests.proof.chaos.scenarios  # noqa: F401  registers them
from tests.proof.chaos.scenario import SCENARIOS, run

if TYPE_CHECKING:
    from pathlib import Path

    from tests.proof.chaos.world import Ground

SEED = 1

HONEST = (
    "kill_workers_in_gaps",
    "standby_promoted",
    "rolling_restart",
    "valkey_flushed",
    "deaths_in_mid_effect",  # the healthy twin of the one below
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", HONEST)
def test_nothing_is_lost_and_nothing_happens_twice(name: str, server_folder: Path, ground: Ground) -> None:
    result = asyncio.run(run(SCENARIOS[name], SEED, server_folder, ground))
    assert result.wrong == []
    assert result.verdict.lost == []
    assert result.verdict.duplicated == []
    assert result.verdict.clean
    assert result.verdict.accepted > 10


def test_a_system_with_a_bug_is_accused(server_folder: Path, ground: Ground) -> None:
    result = asyncio.run(run(SCENARIOS["bug_complete_before_effect"], SEED, server_folder, ground))
    assert result.wrong == []
    assert result.verdict.accepted > 10
    assert any("no booking (completed)" in each for each in result.verdict.lost)
    assert result.passed
