"""The relay purges what was completed long ago, from time to time."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

from service.database.driver import open_connection
from service.ledger.purging import Purged, purge_step_by_step
from service.ledger.statistics import forget_minutes, forget_processes
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from relay.process.tally import Tally
    from service.settings import Settings

_log = get_logger(__name__)

EVERY = 60.0
"""Seconds between the purges of a relay."""

PAGE = 2_000
"""Rows of minutes that go in one transaction."""


async def purge_regularly(settings: Settings, tally: Tally) -> None:
    """Purge once a minute until cancelled, on a connection that is open no longer than that takes."""
    keep = timedelta(seconds=settings.outbox.keep_completed)
    keep_http_keys = timedelta(seconds=settings.api.keep_idempotency_keys)
    keep_statistics = timedelta(seconds=settings.outbox.keep_statistics)
    while True:
        await asyncio.sleep(EVERY)
        try:
            connection = await open_connection(settings.database, "outbox-purge")
            try:
                purged = await purge_step_by_step(connection, keep, keep_http_keys) or Purged(0, 0)
                tally.purged["outbox_message"] += purged.deliveries
                tally.purged["idempotency_key"] += purged.idempotency_keys
                minutes = PAGE
                while minutes == PAGE:
                    minutes = await forget_minutes(connection, keep_statistics, PAGE)
                    tally.purged["outbox_minute"] += minutes
                await forget_processes(connection)
            finally:
                await connection.close(timeout=2)
        except Exception as error:  # noqa: BLE001  whatever it is, the next one may succeed
            tally.purge_failures += 1
            _log.warning("relay.purge_failed", error=f"{type(error).__name__}: {error}"[:200])
        else:
            _log.debug("relay.purged", deliveries=purged.deliveries)
