"""A port of its own that serves the metrics to Prometheus, at `/metrics` and nowhere else.

What must stay true: a scraper that is slow, hostile or one of many holds nothing up. A connection has one request, a
bounded time and a bounded size; there is one page at most in the making, which all who ask meanwhile share; it is
rendered in a thread; and a port that is taken stops no process from doing its work.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from service.telemetry.logs import get_logger
from service.telemetry.metrics import CONTENT_TYPE, render

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from service.telemetry.metrics import Sample

    Collect = Callable[[], Awaitable[Iterable[Sample]]]

_log = get_logger(__name__)

WITHIN = 10.0
"""Seconds for a request and its answer, the time that Prometheus itself waits."""

AT_ONCE = 16
"""Connections; more are closed at once."""

_HEAD_BYTES = 8_192
_TRY_AGAIN = 5.0


@asynccontextmanager
async def metrics_served(host: str, port: int, collect: Collect) -> AsyncIterator[None]:
    """Serve what `collect` returns for as long as the block runs. It has to bound its own time."""
    endpoint = _Endpoint(collect)
    listening = asyncio.create_task(endpoint.listen(host, port))
    try:
        yield
    finally:
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await endpoint.close()


class _Endpoint:
    def __init__(self, collect: Collect) -> None:
        self._collect = collect
        self._making: asyncio.Task[bytes] | None = None
        self._clients: set[asyncio.Task[None] | None] = set()

    async def listen(self, host: str, port: int) -> None:
        """Until cancelled. A port that is taken may be that of the process before, which is ending."""
        told = False
        while True:
            try:
                server = await asyncio.start_server(self._serve, host, port, limit=_HEAD_BYTES)
            except (OSError, UnicodeError) as error:  # the latter of a name that is none
                if not told:
                    _log.warning("metrics.not_served", host=host, port=port, error=str(error))
                told = True
                await asyncio.sleep(_TRY_AGAIN)
            else:
                break
        _log.info("metrics.served", host=host, port=port)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            server.close()

    async def close(self) -> None:
        tasks = [task for task in (*self._clients, self._making) if task is not None and not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = asyncio.current_task()
        self._clients.add(client)
        try:
            async with asyncio.timeout(WITHIN):
                if len(self._clients) <= AT_ONCE:
                    writer.write(await self._answer(reader))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # it is gone, too slow or says too much
        finally:
            self._clients.discard(client)
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        method, _, rest = (await reader.readuntil(b"\r\n\r\n")).partition(b" ")
        if rest.partition(b" ")[0].partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found")
        if method != b"GET":
            return _response("405 Method Not Allowed", "Allow: GET\r\n")
        try:
            return _response("200 OK", f"Content-Type: {CONTENT_TYPE}\r\n", await self._page())
        except Exception:  # noqa: BLE001  a bug in what collects them: the process goes on
            _log.exception("metrics.failed")
            return _response("500 Internal Server Error")

    async def _page(self) -> bytes:
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make())
        return await asyncio.shield(self._making)

    async def _make(self) -> bytes:
        return await asyncio.to_thread(render, await self._collect())


def _response(status: str, headers: str = "", body: bytes = b"") -> bytes:
    return f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
