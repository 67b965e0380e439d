"""Real processes that trace, and a collector that takes what they export."""

from __future__ import annotations

import socket
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
def silent() -> Iterator[str]:
    """Where a collector listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
async def processes(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Processes]:
    """Starts processes on this test's database and broker."""
    started = Processes(environment, tmp_path)
    yield started
    await started.stop()
