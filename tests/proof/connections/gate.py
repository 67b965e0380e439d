"""A gate that ends TLS in front of a real server without it, and notes what each client did.

It speaks PostgreSQL's way to ask for TLS, which `tests/servers/proxy.py` passes on without a look.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Awaitable, Callable

    Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]

__all__ = ["Gate", "gate"]

_SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


class Gate:
    """Attributes: `encrypted` and `plain` count the connections on which a client sent something to the server."""

    def __init__(self, upstream: Callable[[], Awaitable[Streams]], context: ssl.SSLContext | None) -> None:
        self.encrypted = 0
        self.plain = 0
        self.port = 0
        self._upstream = upstream
        self._context = context

    async def as_postgres(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client that asks for TLS before it begins, as those of PostgreSQL do."""
        first, encrypted = await reader.readexactly(8), False
        if first == _SSL_REQUEST:
            writer.write(b"N" if self._context is None else b"S")
            if self._context is not None:
                await writer.start_tls(self._context)
                encrypted = True
            first = await reader.readexactly(8)
        await self._pass_on(reader, writer, first, encrypted=encrypted)

    async def as_other(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a client whose connection is encrypted from the start."""
        await self._pass_on(reader, writer, await reader.readexactly(1), encrypted=True)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes, *, encrypted: bool
    ) -> None:
        self.encrypted += encrypted
        self.plain += not encrypted
        answers, upstream = await self._upstream()
        upstream.write(first)
        try:
            await asyncio.gather(_copy(reader, upstream), _copy(answers, writer))
        finally:
            upstream.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65_536):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def gate(
    upstream: Callable[[], Awaitable[Streams]], context: ssl.SSLContext | None, *, postgres: bool = False
) -> AsyncIterator[Gate]:
    """A gate on a port of 127.0.0.1."""
    opened = Gate(upstream, context)
    clients: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        clients.add(task)
        # A client that trusts the certificate not, or goes away.
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await (opened.as_postgres if postgres else opened.as_other)(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=None if postgres else context)
    opened.port = server.sockets[0].getsockname()[1]
    try:
        yield opened
    finally:
        server.close()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients)
