"""A TCP proxy in a process of its own, one listener for each link, whose behaviour is changed by lines on stdin.

Not `tests/servers/proxy.py`, whose rules are functions of a test and run on its loop: this one keeps its pace while the
suite is busy, and ends connections at random.

    python -m tests.proof.chaos.proxy '{"worker-1:db": ["127.0.0.1", 5433]}' SEED answers {"worker-1:db": 41001}
    {"links": "worker-*:db", "mode": "latency", "value": 0.05}              answers 0

Modes: `clear`; `latency` (value: seconds for each chunk, both ways); `stall` (nothing gets through until cleared);
`stall_replies` (what the server says does not); `cut_before` and `cut_after` (value: chance that a request breaks the
connection before or after the server has it); `cut_commit` (the same after a COMMIT, and only then); and, done once to
the connections that are open, `reset` (RST) and `half_open` (dead for ever, and neither side is told). `aim` resets and
leads to the Unix socket `socket` from now on. Each command is answered with the number of connections cut so far.
"""

from __future__ import annotations

import asyncio
import fnmatch
import json
import os
import random
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

_LINGER = struct.pack("ii", 1, 0)
_CHUNK = 65_536
_dice = random.Random()


class Link:
    """A listener and how it behaves now."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.socket = ""
        self.mode = "clear"
        self.value = 0.0
        self.cuts = 0
        self.changed = asyncio.Event()
        self.pairs: set[Pair] = set()

    def set(self, mode: str, value: float) -> None:
        """Behave like this from now on."""
        if mode in ("reset", "half_open"):
            for pair in list(self.pairs):
                pair.dead = mode == "half_open"
                if mode == "reset":
                    pair.reset()
            return
        self.mode, self.value = mode, value
        self.changed.set()
        self.changed = asyncio.Event()

    def aim(self, path: str) -> None:
        """Connect to another server from now on."""
        self.socket = path
        self.set("reset", 0)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.socket:
            return await asyncio.open_unix_connection(self.socket)
        return await asyncio.open_connection(*self.target)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client."""
        try:
            upstream = await self._connect()
        except OSError:
            _abort(writer)
            return
        pair = Pair(self, writer, upstream[1])
        self.pairs.add(pair)
        try:
            await asyncio.gather(
                pair.pump(reader, upstream[1], request=True), pair.pump(upstream[0], writer, request=False)
            )
        finally:
            self.pairs.discard(pair)
            for each in (writer, upstream[1]):
                each.close()


class Pair:
    """A client's connection and the server's."""

    def __init__(self, link: Link, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.link = link
        self.client = client
        self.server = server
        self.dead = False
        self.cut = False

    def reset(self) -> None:
        """Break both sides at once."""
        _abort(self.client)
        _abort(self.server)

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, request: bool) -> None:
        """Copy one direction until it ends."""
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if not await self._passes(request=request):
                    continue
                writer.write(chunk)
                await writer.drain()
                if request and self._loses_reply(chunk) and _dice.random() < self.link.value:
                    await self._lose_reply()
        if not self.dead:
            with suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _passes(self, *, request: bool) -> bool:
        """Wait as the link's mode demands; whether the chunk goes on."""
        link = self.link
        while link.mode == "stall" or (link.mode == "stall_replies" and not request):
            await link.changed.wait()
        if link.mode == "latency":
            await asyncio.sleep(link.value)
        if request and link.mode == "cut_before" and _dice.random() < link.value:
            self.cut = True
            link.cuts += 1
            self.reset()
        return not self.dead and not self.cut

    def _loses_reply(self, chunk: bytes) -> bool:
        return self.link.mode == "cut_after" or (self.link.mode == "cut_commit" and b"COMMIT" in chunk)

    async def _lose_reply(self) -> None:
        """Let the server carry the request out; the client never hears of it."""
        self.cut = True
        self.link.cuts += 1
        await asyncio.sleep(0.3)
        self.reset()


def _abort(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    writer.transport.abort()


async def _commands(links: dict[str, Link]) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command: dict[str, Any] = json.loads(line)
        for name in fnmatch.filter(links, command["links"]):
            if command["mode"] == "aim":
                links[name].aim(command["socket"])
            else:
                links[name].set(command["mode"], command.get("value", 0.0))
        print(sum(link.cuts for link in links.values()), flush=True)


async def main(targets: dict[str, tuple[str, int]]) -> None:
    """Serve until stdin ends."""
    links = {name: Link((host, port)) for name, (host, port) in targets.items()}
    servers = {name: await asyncio.start_server(link.accept, "127.0.0.1", 0) for name, link in links.items()}
    print(json.dumps({name: server.sockets[0].getsockname()[1] for name, server in servers.items()}), flush=True)
    await _commands(links)
    os._exit(0)  # connections are cut in the middle here, which is nothing to report


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _dice.seed(sys.argv[2])
        asyncio.run(main(json.loads(sys.argv[1])))
