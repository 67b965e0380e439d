"""The outside world: a server that writes down what it really received, and only then acknowledges."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

__all__ = ["Copy", "Sink"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One effect received."""

    at: float
    key: str
    subject: str
    consumer: str
    attempt: int
    pid: int


class Sink:
    """Listens on a loopback port while it is entered; `received` is everything so far, in order."""

    def __init__(self) -> None:
        self.received: list[Copy] = []
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError):
            line = await reader.readline()
            if line.endswith(b"\n"):
                self.received.append(Copy(at=time.time(), **json.loads(line)))
                writer.write(b"ok\n")
                await writer.drain()
        writer.close()
