"""A worker's heartbeat keeps the leases, whatever becomes of its connection."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from service.database.driver import connect as connect_to
from service.dev.places import ROOT
from service.ledger import delivering
from service.outbox.running.heartbeat import Heartbeat
from service.outbox.running.runner import Runner
from tests.servers.proxy import through_a_proxy
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database.driver import Connection
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger
    from tests.servers.proxy import Link

LEASE = timedelta(seconds=3)
LONGEST = timedelta(minutes=1)

_OUTLIVES_ITS_WORKER = """
import asyncio, atexit, threading, time
from datetime import timedelta
from service.outbox.running.heartbeat import Heartbeat
from service.worker.process import _exit_on_dead_thread

async def connect():
    tried.set()
    await asyncio.sleep(0.3)
    raise OSError

tried = threading.Event()
threading.excepthook = _exit_on_dead_thread
Heartbeat(connect, timedelta(seconds=3)).start()
tried.wait()
atexit.register(time.sleep, 1)
"""


@asynccontextmanager
async def beating(settings: Settings, *, transactions: bool = False) -> AsyncIterator[Heartbeat]:
    heartbeat = Heartbeat(lambda: connect_to(settings.database, "test-heartbeat"), LEASE, transactions=transactions)
    heartbeat.start()
    try:
        yield heartbeat
    finally:
        await asyncio.to_thread(heartbeat.stop)


def ready(link: Link) -> bool:
    """Whether the statement was sent on it, and so is prepared."""
    return b"outbox_message" in link.asked


async def test_it_is_ready_before_there_is_a_lease_to_extend_and_after_a_restart(settings: Settings) -> None:
    """A run that calculates would leave it no time to connect."""
    async with through_a_proxy(settings) as between, beating(settings):
        await until(lambda: [ready(link) for link in between.links] == [True])
        between.links[0].cut()
        await until(lambda: [ready(link) for link in between.links] == [True, True])


@pytest.mark.parametrize("transactions", [False, True])
async def test_a_connection_that_hangs_is_replaced_while_the_lease_lasts(
    ledger: Ledger, settings: Settings, connect: Connect, transactions: bool
) -> None:
    message_id = await ledger.happen()
    never = asyncio.Event()

    async def hang(link: Link, chunk: bytes) -> bytes:
        if link is between.links[0] and chunk.startswith(b"B"):  # Bind
            await never.wait()
        return chunk

    async with through_a_proxy(settings) as between, beating(settings, transactions=transactions) as heartbeat:
        await until(lambda: [ready(link) for link in between.links] == [True])
        between.request = hang
        token = uuid4()
        assert await delivering.claim(await connect(), message_id, token, LEASE)
        heartbeat.watch(message_id, token, LONGEST)

        async def extended() -> bool:
            row = await ledger.row(message_id)
            assert row is not None
            if row["due_in"] < LEASE.total_seconds() / 6:
                raise TimeoutError("the lease ends")
            return len(between.links) > 1 and row["due_in"] > LEASE.total_seconds() * 0.9

        await until(extended)


async def test_it_outlives_whatever_the_driver_comes_across_when_a_connection_hangs(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections: list[Connection] = []

    async def terminated_between_two_steps(connection: Connection, *_: Any) -> None:
        connections.append(connection)
        ended = asyncio.Event()
        connection.add_termination_listener(lambda _: ended.set())
        await ended.wait()
        connection._protocol._get_timeout(None)  # type: ignore[attr-defined]  # as asyncpg does

    monkeypatch.setattr(delivering, "heartbeat", terminated_between_two_steps)
    async with beating(settings) as heartbeat:
        await until(lambda: len(connections) > 1)
        assert heartbeat.is_alive()


async def test_an_error_that_nobody_expects_ends_its_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so the process: a worker without heartbeats would lose the lease of all that takes long."""
    died: list[threading.ExceptHookArgs] = []

    async def unexpected(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(threading, "excepthook", died.append)
    monkeypatch.setattr(delivering, "heartbeat", unexpected)
    async with beating(settings):
        await until(lambda: [each.exc_type for each in died] == [ZeroDivisionError])


async def test_a_runner_whose_closing_is_cut_short_still_ends_it(settings: Settings, engine: AsyncEngine) -> None:
    runner = Runner(settings, engine)
    await runner.open()
    (heartbeat,) = (each for each in threading.enumerate() if isinstance(each, Heartbeat))
    endless = asyncio.create_task(asyncio.Event().wait())
    runner._unsettled[uuid4()] = endless  # type: ignore[assignment]  # PostgreSQL does not take an outcome
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await runner.close()
    endless.cancel()
    assert not heartbeat.is_alive()


@pytest.mark.parametrize("transactions", [False, True])
@pytest.mark.parametrize("at", [b"", b"set_config", b"outbox_message"])
async def test_one_whose_connection_hangs_is_stopped_at_once(settings: Settings, at: bytes, transactions: bool) -> None:
    """While it connects, makes the connection ready, or extends leases; and nothing is left on its loop."""
    hangs, never = asyncio.Event(), asyncio.Event()

    async def hang(_link: Link, chunk: bytes) -> bytes:
        if at in chunk:
            hangs.set()
            await never.wait()
        return chunk

    async with through_a_proxy(settings) as between:
        between.request = hang
        async with beating(settings, transactions=transactions) as heartbeat:
            await hangs.wait()
            async with asyncio.timeout(2):
                await asyncio.to_thread(heartbeat.stop)
            assert not heartbeat.is_alive()
    assert not asyncio.all_tasks(heartbeat._loop)


@pytest.mark.slow
async def test_one_that_cannot_be_stopped_in_time_does_not_fail_the_workers_exit() -> None:
    """A connection may hang for longer than a stopping worker waits; a dead thread would be status 70."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OUTLIVES_ITS_WORKER, cwd=ROOT, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors.decode()) == (0, "")
