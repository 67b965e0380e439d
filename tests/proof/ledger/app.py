"""The worker process of the ledger's tests: `dramatiq tests.proof.ledger.app:setup_broker`."""

from __future__ import annotations

import tests.proof.ledger.domain  # noqa: F401  registers the consumers
from tests.servers.broker import setup_broker

__all__ = ["setup_broker"]
