"""The API behind a real HTTP server, in the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn

from service.http.protocol import BoundedProtocol
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

__all__ = ["raw_request", "serve"]


class _Server(uvicorn.Server):
    """Ends as soon as it is told to. uvicorn's own looks for that ten times a second, and hundreds of tests wait."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.told.wait()


@asynccontextmanager
async def serve(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `app`, which listens on a free loopback port."""
    # Without a protocol that it knows, asyncio does not switch Nagle's algorithm off, and each answer takes 40 ms more.
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        server = _Server(uvicorn.Config(app, http=BoundedProtocol, lifespan="on", log_config=None, ws="none"))
        running = asyncio.create_task(server.serve(sockets=[listening]))
        await until(lambda: server.started or running.done(), what="the server")
        host, port = listening.getsockname()
        try:
            async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30) as client:
                yield client
        finally:
            server.told.set()
            await running


async def raw_request(client: httpx.AsyncClient, request: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to bytes that no well-behaved client would send, or not all of them."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), body
