"""The outside world: a server that writes down what it really received, and only then acknowledges.

`python -m tests.proof.chaos.sink FILE` answers its port, and serves until its stdin ends. It is a process of its own,
so that nothing the suite does can make it late.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from service.dev.places import ROOT

__all__ = ["Copy", "Sink"]


@dataclass(frozen=True, slots=True)
class Copy:
    """One effect received, and when the run that made it began; both by the sink's clock."""

    at: float
    key: str
    subject: str
    consumer: str
    attempt: int
    pid: int
    began: float


class Sink:
    """The suite's side: starts the process, and reads what it wrote down."""

    def __init__(self, file: Path) -> None:
        self.port = 0
        self._file = file
        self._read = 0
        self._received: list[Copy] = []
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._file.touch()
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.proof.chaos.sink", str(self._file),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(await self._process.stdout.readline())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    @property
    def received(self) -> list[Copy]:
        """Everything so far, in order."""
        with self._file.open() as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._received.append(Copy(**json.loads(line)))
                self._read = file.tell()
        return self._received


def _dated(copy: dict[str, Any]) -> dict[str, Any]:
    """`began` comes as the monotonic clock's, which all processes share, whatever they take the time for."""
    now = time.time()
    return {**copy, "at": now, "began": now - (time.monotonic() - copy["began"])}


async def _serve(file: Path) -> None:
    with file.open("a") as received:

        async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, ValueError):
                line = await reader.readline()
                if line.endswith(b"\n"):
                    received.write(json.dumps(_dated(json.loads(line))) + "\n")
                    received.flush()
                    writer.write(b"ok\n")
                    await writer.drain()
            writer.close()

        server = await asyncio.start_server(receive, "127.0.0.1", 0, backlog=500)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.close()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
