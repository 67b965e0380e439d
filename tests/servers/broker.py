"""The worker of whatever consumers were imported: `service.worker:setup_broker` adds those of the domains to them."""

from __future__ import annotations

import dramatiq

from service.settings import load_settings
from service.telemetry.logs import configure_logging
from service.worker import build

__all__ = ["setup_broker"]


def setup_broker() -> None:
    """Make the broker from the settings, and declare the consumers that are registered by now."""
    settings = load_settings()
    configure_logging(settings.log_format, settings.log_level)
    dramatiq.set_broker(build(settings))
