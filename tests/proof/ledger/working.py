"""Real worker processes with the consumers of the ledger's test domain."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tests.servers.processes import Started
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from service.settings import Settings

__all__ = ["start_worker", "working"]


def start_worker(environment: dict[str, str], log: Path, *arguments: str) -> Started:
    """A Dramatiq master with one child and four threads, unless the arguments say otherwise; it is not ready yet."""
    arguments = arguments or ("-p", "1", "-t", "4")
    return Started(environment, log, "dramatiq", "tests.proof.ledger.app:setup_broker", *arguments)


@asynccontextmanager
async def working(
    environment: dict[str, str], settings: Settings, folder: Path, *arguments: str
) -> AsyncIterator[Started]:
    """A worker that is ready, and a relay."""
    worker = start_worker(environment, folder / "worker.log", *arguments)
    try:
        async with relaying(settings):
            await until(lambda: worker.says("ready for action"))
            yield worker
    finally:
        await worker.stop()
