"""A relay that is told of nothing, to compare with one that a trigger wakes: `python -m tests.proof.bench.polling`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import relay.process.loop
from relay.process.wakeup import Wakeup
from service.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["main"]


class _Polling(Wakeup):
    async def sleep(self, look: Callable[[], Awaitable[float]], longest: float, shortest: float = 0) -> bool:
        """Wait 50 ms, told of nothing."""
        if not self._ended:
            await asyncio.sleep(0.05)
        return False


def main() -> int:
    """Run it until SIGTERM."""
    vars(relay.process.loop)["Wakeup"] = _Polling
    return asyncio.run(relay.process.loop.run(load_settings()))


if __name__ == "__main__":
    sys.exit(main())
