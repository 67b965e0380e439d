"""`outbox purge`."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import Json, connect, parse_duration
from relay.cli.output import line, note, print_json
from service.ledger.purging import Purged, purge_step_by_step
from service.settings import load_settings

if TYPE_CHECKING:
    from service.settings import Settings

_REPORT_EVERY = 250_000


def purge(
    older_than: Annotated[
        str | None,
        typer.Option(help="Remove what was completed longer ago than this: 7d, 12h. By default the setting."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    as_json: Json = False,
) -> None:
    """Remove old completed deliveries. And old HTTP idempotency keys.

    Old is what was completed longer ago than OUTBOX__KEEP_COMPLETED. The relay does this by itself from time to time.
    Open deliveries and dead letters are never removed.
    """
    settings = load_settings()
    keep = timedelta(seconds=settings.outbox.keep_completed)
    if older_than is not None:
        keep = parse_duration(older_than, "--older-than")
    purged = asyncio.run(_purge(settings, keep, dry_run))
    if as_json:
        counts = {"messages": purged.deliveries, "idempotency_keys": purged.idempotency_keys} if purged else {}
        print_json({"dry_run": dry_run, "busy": purged is None} | counts)
    elif purged is None:
        line("Another purge is at work; nothing to do here.")
    elif dry_run:
        line(f"{purged.deliveries:,} completed deliveries would be removed; nothing was done.")
    else:
        line(
            f"Removed {purged.deliveries:,} completed deliveries and {purged.idempotency_keys:,} HTTP idempotency keys."
        )


async def _purge(settings: Settings, keep: timedelta, dry_run: bool) -> Purged | None:
    reported = 0

    def progress(removed: int) -> None:
        nonlocal reported
        if removed - reported >= _REPORT_EVERY:
            reported = removed
            note(f"{removed:,} so far")

    async with connect(settings.database) as connection:
        keep_http_keys = timedelta(seconds=settings.api.keep_idempotency_keys)
        return await purge_step_by_step(connection, keep, keep_http_keys, dry_run=dry_run, progress=progress)
