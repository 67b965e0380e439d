"""A listener between a client and a real server, where a test decides what goes through."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from service.settings import Settings

__all__ = ["Link", "Proxy", "proxy", "socket_of", "through_a_proxy"]


class Link:
    """One client's connection. `asked` is all that the client has sent."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.asked = b""
        self._writers = writers

    def cut(self) -> None:
        """Break both sides at once."""
        for each in self._writers:
            each.transport.abort()

    def reset(self) -> None:
        """Break both sides at once; the client is told so by a reset."""
        client: socket.socket = self._writers[0].get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.cut()


async def _pass(_link: Link, chunk: bytes) -> bytes:
    return chunk


class Proxy:
    """What becomes of each chunk: the rules return what is passed on, as late as they like."""

    def __init__(self, upstream: str) -> None:
        self.request: Callable[[Link, bytes], Awaitable[bytes]] = _pass
        self.reply: Callable[[Link, bytes], Awaitable[bytes]] = _pass
        self.links: list[Link] = []
        self.port = 0
        self._upstream = upstream
        self._silent = False

    def allow_all(self) -> None:
        """Pass everything on from now on."""
        self.request = self.reply = _pass

    def fall_silent(self) -> None:
        """Pass nothing on from now on, not even the end of a connection, as a network does that is gone."""
        self._silent = True

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        answers, upstream = await asyncio.open_unix_connection(self._upstream)
        link = Link(writer, upstream)
        self.links.append(link)
        with suppress(OSError, asyncio.CancelledError):  # the test's loop ends while a rule waits
            await asyncio.gather(self._ask(link, reader, upstream), self._answer(link, answers, writer))
        link.cut()

    async def _ask(self, link: Link, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65_536):
            link.asked += chunk
            if not self._silent:
                upstream.write(await self.request(link, chunk))
        upstream.write_eof()

    async def _answer(self, link: Link, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await answers.read(65_536):
            if not self._silent:
                writer.write(await self.reply(link, chunk))
        if self._silent:
            await asyncio.Event().wait()
        link.cut()


@asynccontextmanager
async def proxy(path: str) -> AsyncIterator[Proxy]:
    """A proxy on a loopback port in front of a server's Unix socket."""
    opened = Proxy(path)
    server = await asyncio.start_server(opened.accept, "127.0.0.1", 0)
    opened.port = server.sockets[0].getsockname()[1]
    try:
        yield opened
    finally:
        server.close()
        for link in opened.links:
            link.cut()


@asynccontextmanager
async def through_a_proxy(settings: Settings) -> AsyncIterator[Proxy]:
    """PostgreSQL behind a proxy, for whoever uses the settings."""
    url = make_url(settings.database.dsn)
    async with proxy(socket_of(settings.database.dsn)) as between:
        settings.database.url = type(settings.database.url)(
            f"postgresql://{url.username}@127.0.0.1:{between.port}/{url.database}?sslmode=disable"
        )
        yield between


def socket_of(url: str) -> str:
    """The Unix socket of a PostgreSQL's or Valkey's URL."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    query = parse_qs(parts.query)
    return f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
