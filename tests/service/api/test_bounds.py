"""What a client sends, or does not send, before there is a request: the process that is shipped keeps little of it."""

from __future__ import annotations

import asyncio
import re
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest

from service.dev.places import ROOT
from service.dev.stack import api_command
from service.http.protocol import MAX_HEAD_BYTES
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
HEAD = b"GET /health/live HTTP/1.1\r\nHost: test\r\n"
CHUNKED = b"POST /products HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The API and its port. No test here comes as far as its servers."""
    log: Path = tmp_path_factory.mktemp("bounds") / "log"
    environment = {"DATABASE__URL": "postgresql://nobody@127.0.0.1:1/none", "BROKER__URL": "redis://127.0.0.1:1/0"}
    environment["IDENTITY__OFF"] = "true"
    with log.open("wb") as stderr:
        process = subprocess.Popen(api_command(0), cwd=ROOT, env=environment, stderr=stderr)
    try:
        found = until_sync(lambda: re.search(r"running on http://[\d.]+:(\d+)", log.read_text()), timeout=60)
        assert found is not None
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


Process = tuple[subprocess.Popen[bytes], int]


async def _answer(port: int, *parts: bytes) -> bytes:
    """What comes back, if that is more than a broken connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        async with asyncio.timeout(60):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("begins", "goes_on"),
    [
        (HEAD + b"X-Long: ", b"a" * MIB),
        (HEAD, (b"X-Many: " + b"a" * 1000 + b"\r\n") * 1000),
        (b"GET /", b"a" * MIB),
        (b"", b"\r\n" * (MIB // 2)),
        (CHUNKED + b"1;", b"a" * MIB),
        (CHUNKED + b"1\r\n{\r\n0\r\nX-Trailer: ", b"a" * MIB),
    ],
    ids=["a header", "headers", "an address", "empty lines", "a chunk's extension", "a trailer"],
)
async def test_a_request_without_end_is_not_read(process: Process, begins: bytes, goes_on: bytes) -> None:
    server, port = process
    assert b" 200 " in await _answer(port, HEAD + b"Connection: close\r\n\r\n")
    used = psutil.Process(server.pid).memory_info().rss
    for answer in await asyncio.gather(*(_answer(port, begins, *[goes_on] * 60) for _ in range(3))):
        assert answer == b"" or b" 431 " in answer.partition(b"\r\n")[0]
    assert psutil.Process(server.pid).memory_info().rss - used < 30 * MIB


@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES - 1_000, b"200"), (MAX_HEAD_BYTES + 1, b"431")])
async def test_the_size_of_a_head_that_comes_at_once(process: Process, size: int, status: bytes) -> None:
    answer = await _answer(process[1], HEAD + b"Connection: close\r\nX-Long: " + b"a" * size + b"\r\n\r\n")
    assert answer.split()[1] == status


async def _closed(port: int, begins: bytes, goes_on: bytes) -> bytes:
    """What came back until the server closed a connection on which something comes every second, if it is not empty."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begins)
    received = b""
    try:
        while True:
            try:
                async with asyncio.timeout(1):
                    while more := await reader.read(65_536):
                        received += more
                    return received
            except TimeoutError:
                writer.write(goes_on)
    except ConnectionError:
        return received
    finally:
        writer.close()


_WITHOUT_A_REQUEST = {
    "silent": (b"", b"", b""),
    "half-sent": (HEAD, b"", b"408"),
    "trickling": (HEAD, b"X-a: b\r\n", b"408"),
    "empty lines": (b"", b"\r\n", b""),
    "empty lines later": (HEAD + b"\r\n", b"\r\n", b"200"),
    "the second": (HEAD + b"\r\n" + HEAD, b"X-a: b\r\n", b"200"),
    "a body nobody wants": (
        b"POST /nothing HTTP/1.1\r\nHost: test\r\nContent-Length: 60000\r\n\r\n",
        b"a",
        b"404",
    ),
}


@pytest.mark.slow
async def test_a_connection_without_a_request_is_closed(process: Process) -> None:
    async def statuses(begins: bytes, goes_on: bytes) -> set[bytes]:
        answers = await asyncio.gather(*(_closed(process[1], begins, goes_on) for _ in range(40)))
        return {b"".join(answer.split()[1:2]) for answer in answers}

    async with asyncio.timeout(60):  # all kinds at once: each takes the time that a connection has
        seen = await asyncio.gather(*(statuses(begins, goes_on) for begins, goes_on, _ in _WITHOUT_A_REQUEST.values()))
    expected = {kind: {status} for kind, (_, _, status) in _WITHOUT_A_REQUEST.items()}
    assert dict(zip(_WITHOUT_A_REQUEST, seen, strict=True)) == expected
