"""The relay as a process: how it ends, what it leaves behind when it freezes, and that it purges."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url

from tests.proof.ledger.looks import dispatched
from tests.servers.proxy import Link, Proxy, proxy, socket_of
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator
    from pathlib import Path
    from uuid import UUID

    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

pytestmark = pytest.mark.slow


@asynccontextmanager
async def relay(environment: dict[str, str], log: Path) -> AsyncIterator[Process]:
    """A relay process."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "relay", "relay", env=environment, stderr=output
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Held:
    """A Valkey that keeps each batch for `ledger` waiting until `let_go`."""

    def __init__(self, between: Proxy) -> None:
        self.url = f"redis://127.0.0.1:{between.port}/0"
        self.reached = asyncio.Event()
        self._gone = asyncio.Event()
        between.request = self._hold

    async def _hold(self, _link: Link, chunk: bytes) -> bytes:
        if b":ledger" in chunk:
            self.reached.set()
            await self._gone.wait()
        return chunk

    def let_go(self) -> None:
        self._gone.set()


@pytest.fixture
async def held(own_valkey: Valkey) -> AsyncIterator[Held]:
    async with proxy(socket_of(own_valkey.url)) as between:
        yield Held(between)


async def test_a_signal_lets_the_batch_at_hand_finish(
    ledger: Ledger, environment: dict[str, str], held: Held, tmp_path: Path
) -> None:
    (message_id,) = await ledger.publish()
    log = tmp_path / "log"
    async with relay(environment | {"BROKER__URL": held.url}, log) as process, asyncio.timeout(60):
        await held.reached.wait()
        process.terminate()
        await until(lambda: "relay.stopping" in log.read_text())
        assert await ledger.connection.fetchval(LOCKED)
        held.let_go()
        assert await process.wait() == 0
    assert await ledger.state(message_id) == "dispatched"


LOCKED = """
SELECT NOT EXISTS (SELECT FROM outbox_message FOR UPDATE SKIP LOCKED)
"""


async def test_a_second_signal_does_not_wait_and_loses_nothing(
    ledger: Ledger, environment: dict[str, str], held: Held, settings: Settings, tmp_path: Path
) -> None:
    (message_id,) = await ledger.publish()
    log = tmp_path / "log"
    async with relay(environment | {"BROKER__URL": held.url, "BROKER__PUBLISH_TIMEOUT": "8"}, log) as process:
        async with asyncio.timeout(60):
            await held.reached.wait()
        process.terminate()
        await until(lambda: "relay.stopping" in log.read_text())
        process.terminate()
        async with asyncio.timeout(7):
            assert await process.wait() == 0
    row = await ledger.row(message_id)
    assert row is not None
    assert (row["state"], row["dispatches"]) == ("pending", 0)
    async with relaying(settings):
        await until(lambda: dispatched(ledger, message_id))


@pytest.mark.parametrize("last", [b"BEGIN", b"standby"], ids=["in a transaction", "falling asleep"])
async def test_one_signal_ends_a_relay_whose_database_has_fallen_silent(
    settings: Settings, environment: dict[str, str], tmp_path: Path, last: bytes
) -> None:
    """Whatever it said last: a transaction cannot be rolled back, and the relay may not wait for that."""
    said = asyncio.Event()

    async def listen(_link: Link, chunk: bytes) -> bytes:
        if last in chunk:
            between.fall_silent()
            said.set()
        return chunk

    async with proxy(socket_of(settings.database.dsn)) as between:
        between.reply = listen
        url = make_url(settings.database.dsn)
        own = f"postgresql://{url.username}@127.0.0.1:{between.port}/{url.database}?sslmode=disable"
        async with relay(environment | {"DATABASE__URL": own}, tmp_path / "log") as process, asyncio.timeout(100):
            await said.wait()
            process.terminate()
            async with asyncio.timeout(25):  # a statement would be waited for 30 s
                assert await process.wait() == 0


async def test_a_relay_that_freezes_in_mid_batch_gives_its_rows_back(
    ledger: Ledger, environment: dict[str, str], held: Held, settings: Settings, tmp_path: Path
) -> None:
    """PostgreSQL ends its session after ten seconds."""
    (message_id,) = await ledger.publish()
    async with relay(environment | {"BROKER__URL": held.url}, tmp_path / "log") as process:
        async with asyncio.timeout(60):
            await held.reached.wait()
        process.send_signal(signal.SIGSTOP)
        async with relaying(settings):
            assert await ledger.connection.fetchval(LOCKED)
            await until(lambda: dispatched(ledger, message_id))


async def test_it_purges_by_itself(ledger: Ledger, environment: dict[str, str], tmp_path: Path) -> None:
    (old,) = await ledger.publish()
    await ledger.connection.execute("UPDATE outbox_message SET state = 'completed', completed_at = clock_timestamp()")
    (tmp_path / "sitecustomize.py").write_text("import relay.process.purge\nrelay.process.purge.EVERY = 0.2\n")
    sooner = {"PYTHONPATH": f"{tmp_path}:{os.curdir}", "OUTBOX__KEEP_COMPLETED": "0"}
    async with relay(environment | sooner, tmp_path / "log"):
        await until(lambda: is_gone(ledger, old))


async def is_gone(ledger: Ledger, message_id: UUID) -> bool:
    return await ledger.row(message_id) is None
