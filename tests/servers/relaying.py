"""A relay on the test's own event loop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from relay.process.loop import Relay

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from relay.brokers.sender import Sender
    from service.settings import Settings

__all__ = ["relaying"]


@asynccontextmanager
async def relaying(settings: Settings, sender: Sender | None = None) -> AsyncIterator[Relay]:
    """A relay, until the context ends; it raises what ended the relay before that."""
    relay = Relay(settings, sender)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        relay.stop()
        async with asyncio.timeout(60):
            await task
