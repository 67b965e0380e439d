"""Uvicorn's HTTP protocol with bounds: `uvicorn --http service.http.protocol:BoundedProtocol`.

Uvicorn reads a request line and headers of any size, and waits for the rest of a request for ever. What must stay true:
no connection makes this process keep more than a few hundred kilobytes that no middleware has seen; and one on which no
request is being served is closed in time, however slowly its client sends. The time for a body and its size are the
middleware's, which answers by problem; here nothing may be known of the request yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio
    from typing import Any

MAX_HEAD_BYTES = 32_768
"""Request line and headers; a larger one gets 431."""

REQUEST_WITHIN = 10.0
"""Seconds for a connection to bring a whole request line and headers, from its start or from the last response."""


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._unseen = 0
        self._begun = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what the parser keeps to itself: it hands on a header when it is whole."""
        self._unseen += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unseen > MAX_HEAD_BYTES:
            self._refuse(431)
        elif self._timer is None and not self._serving():
            # Uvicorn's own clock, of connections that are kept for the next request, stops at the first byte.
            self._start_clock()

    def on_message_begin(self) -> None:
        self._begun, self._unseen = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The request is there, but for its body."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEAD_BYTES:
            self._refuse(431)
            return
        self._begun, self._unseen = False, 0
        self._stop_clock()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body, which the application bounds."""
        self._unseen = 0
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._unseen = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def _serving(self) -> bool:
        return not getattr(self.cycle, "response_complete", True)  # there is none before the first

    def _start_clock(self) -> None:
        self._timer = self.loop.call_later(REQUEST_WITHIN, self._out_of_time)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _out_of_time(self) -> None:
        self._timer = None
        if self.transport.is_closing() or self._serving():
            return
        if self._begun:
            self._refuse(408)
        else:
            self.transport.close()

    def _refuse(self, status: int) -> None:
        self.logger.info("A request was refused with %d before it was there.", status)
        if not self._serving():
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
