"""The worker process of the ledger's tests: `dramatiq tests.proof.ledger.app:setup_broker`."""

from __future__ import annotations

import dramatiq

import tests.proof.ledger.domain  # noqa: F401  registers the consumers
from service.settings import load_settings
from service.telemetry.logs import configure_logging
from service.worker import build


def setup_broker() -> None:
    """A broker with the ledger's test consumers only."""
    settings = load_settings()
    configure_logging(settings.log_format, settings.log_level)
    dramatiq.set_broker(build(settings))
