"""Real processes under load, whose log nobody takes: events go on, leases are kept, and SIGTERM ends the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import httpx
import psutil
import pytest

from service.dev.places import ROOT
from service.dev.servers import free_port
from tests.proof.ledger import domain
from tests.proof.ledger.looks import all_completed, is_state
from tests.proof.ledger.working import working
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

pytestmark = pytest.mark.slow

_EVENTS = 200
"""At DEBUG, each of them logs more than a kilobyte; the pipes on the way hold 64 each."""


@contextmanager
def unread(environment: dict[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose stdout and stderr are a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"." * 65_536)
    except BlockingIOError:
        os.set_blocking(writer, True)
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment | {"LOG_LEVEL": "DEBUG"},
        stdout=writer,
        stderr=writer,
        process_group=0,
    )
    os.close(writer)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(reader)


async def publish_and_wait(ledger: Ledger) -> None:
    """Many events, and one whose run takes longer than a lease."""
    (slow,) = await ledger.publish(domain.Happened(subject_id=uuid4(), how="slower"))
    for _ in range(_EVENTS):
        await ledger.publish()
    await until(lambda: all_completed(ledger), timeout=60)
    row = await ledger.row(slow)
    assert row is not None
    assert row["attempts"] == 1


async def test_a_worker_whose_main_process_stands_still(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    """It reads the pipe through which its children log."""
    environment["LOG_LEVEL"] = "DEBUG"
    async with working(environment, settings, tmp_path) as worker:
        (child,) = worker.children()
        master = psutil.Process(worker.process.pid)
        master.suspend()
        try:
            await publish_and_wait(ledger)
            child.terminate()
            await until(lambda: child.status() == psutil.STATUS_ZOMBIE, timeout=60)
        finally:
            master.resume()


async def test_a_worker_that_is_read_again_tells_what_it_has_dropped(
    ledger: Ledger, environment: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    environment["LOG_LEVEL"] = "DEBUG"
    async with working(environment, settings, tmp_path) as worker:
        master = psutil.Process(worker.process.pid)
        master.suspend()
        try:
            for _ in range(5):
                await publish_and_wait(ledger)
        finally:
            master.resume()
        await until(lambda: worker.says("log.dropped"), timeout=60)


async def test_a_worker_whose_log_nobody_reads(ledger: Ledger, environment: dict[str, str], settings: Settings) -> None:
    with unread(environment, "dramatiq", "tests.proof.ledger.app:setup_broker", "-p", "1", "-t", "4") as master:
        async with relaying(settings):
            await publish_and_wait(ledger)
        (child,) = psutil.Process(master.pid).children()
        child.terminate()
        await until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, timeout=60)


async def test_a_relay_whose_log_nobody_reads(ledger: Ledger, environment: dict[str, str]) -> None:
    with unread(environment, "relay", "relay") as relay:
        (message_id,) = await ledger.publish()
        await until(lambda: is_state(ledger, message_id, "dispatched"), timeout=60)
        relay.terminate()
        assert await asyncio.to_thread(relay.wait, 60) == 0


async def test_an_api_whose_log_nobody_reads(environment: dict[str, str]) -> None:
    port = free_port()
    command = ("uvicorn", "service.api:create_app", "--factory", "--host", "127.0.0.1", "--port", str(port))
    with unread(environment, *command) as api:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

            async def answers() -> bool:
                try:
                    return (await client.get("/health/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(answers, timeout=60)
            assert (await client.get("/no/such/path")).status_code == 404
        api.terminate()
        assert await asyncio.to_thread(api.wait, 60) == -signal.SIGTERM
