"""Real processes that trace, and a collector that takes what they export."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.servers.posted import Posted, posted
from tests.servers.processes import Processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture
def collector() -> Iterator[Posted]:
    """Takes spans at `collector.url`."""
    with posted() as kept:
        yield kept


@pytest.fixture
async def processes(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Processes]:
    """Starts processes on this test's database and broker."""
    started = Processes(environment, tmp_path)
    yield started
    await started.stop()
