"""What the suite's tests share: one forge for this process, and a copy of the migrated database for each scenario."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.proof.chaos.launch import Forge
from tests.proof.chaos.world import Ground

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.real_servers import Where


@pytest.fixture(scope="session")
def ground(servers: Where) -> Iterator[Ground]:
    with Forge() as forge:
        yield Ground(Path(servers.seed), forge)
