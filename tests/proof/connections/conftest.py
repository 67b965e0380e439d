"""Certificates for servers of the tests' own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.proof.connections.certificates import Certificates
from tests.proof.ledger.conftest import processes
from tests.proof.rabbitmq.node import node, rabbitmq

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["node", "processes", "rabbitmq"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The run's certificates."""
    folder: Path = tmp_path_factory.mktemp("certificates")
    made = Certificates(folder)
    made.make()
    return made
