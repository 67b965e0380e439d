"""A connection to RabbitMQ with one channel on it, which can be given up at once.

A connection that RabbitMQ has blocked or that hangs cannot be closed in good order: the farewell would wait behind
everything that is stuck. What must stay true: `abort()` never waits, and whoever waits on the line then gets an error.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from aiormq import Channel, Connection, TransportFactory
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from yarl import URL

from service.network.sockets import notice_silence, tls_context

if TYPE_CHECKING:
    from service.settings import BrokerSettings

# It logs every frame and, with a traceback, every connection that is lost; the relay reports the loss in one line.
logging.getLogger("aiormq").setLevel(logging.CRITICAL)

_HEARTBEAT_SECONDS = "20"
_GOODBYE = 2.0


class _Transport(TransportFactory):
    """Makes the transport and keeps hold of it."""

    def __init__(self, *, secure: bool, silence_timeout: int) -> None:
        self._factory = TLSTransportFactory() if secure else TCPTransportFactory()
        self._silence_timeout = silence_timeout
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self._writer = await self._factory.create(url, **kwargs)
        notice_silence(self._writer.get_extra_info("socket"), self._silence_timeout)
        return reader, self._writer

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


class OneChannel:
    """A connection and a channel with sender confirms, once it is open. It is opened once and never mended."""

    def __init__(self, settings: BrokerSettings) -> None:
        address = URL(settings.url.get_secret_value())
        self._url = address.update_query(heartbeat=address.query.get("heartbeat", _HEARTBEAT_SECONDS))
        secure = address.scheme == "amqps"
        self._tls = tls_context(settings.tls_ca_file) if secure else None
        self._transport = _Transport(secure=secure, silence_timeout=settings.silence_timeout)
        self._connection: Connection | None = None
        self.channel: Channel | None = None

    async def open(self) -> Channel:
        self._connection = Connection(self._url, context=self._tls, transport_factory=self._transport)
        await self._connection.connect()
        channel = await self._connection.channel()
        assert isinstance(channel, Channel)
        self.channel = channel
        return channel

    @property
    def ended(self) -> bool:
        """Whether it was open and is no longer."""
        connection, channel = self._connection, self.channel
        return channel is not None and (channel.is_closed or connection is None or not connection.is_opened)

    def reason(self) -> BaseException | None:
        """Why RabbitMQ ended the channel or the connection, where it did."""
        if self.channel is None or not self.channel.is_closed or self.channel.closing.cancelled():
            return None
        return self.channel.closing.exception()

    async def blocked(self) -> bool:
        """Whether RabbitMQ has said that it takes nothing now: it is out of memory or of disk space."""
        if self._connection is None or self.channel is None:
            return False
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return True
        return False

    def abort(self) -> None:
        self._transport.abort()

    async def close(self) -> None:
        """Say goodbye, but do not wait long for the answer."""
        if self._connection is None or self.ended:
            return
        farewell = asyncio.ensure_future(self._connection.close())
        await asyncio.wait((farewell,), timeout=_GOODBYE)
        self.abort()
