"""The worker process of the lanes' tests: `dramatiq tests.proof.lanes.app:setup_broker`."""

from __future__ import annotations

import tests.proof.lanes.domain  # noqa: F401  registers the consumers
from tests.servers.broker import setup_broker

__all__ = ["setup_broker"]
