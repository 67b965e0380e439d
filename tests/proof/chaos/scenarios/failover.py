"""Another PostgreSQL takes over that knows less than the one before: a standby that lagged, a backup of a while ago.

What the lost commits had done is lost with their events, and nothing else. The broker and the workers know more than
the database: messages for rows that do not exist, runs of claims that were never made.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import psutil

from service.dev.places import postgres_binaries
from service.dev.postgres import Postgres, _identity
from tests.proof.chaos.checker import Fault
from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import Plan, World

if TYPE_CHECKING:
    from pathlib import Path


class _Copy(Postgres):
    """A server made from another one's backup; it may be a standby."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, durable=False, settings={"synchronous_commit": "on"})

    def _ready(self) -> bool:
        lines = self._pid_file()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7] in ("ready", "standby")


async def _backup(world: World, name: str, *options: str) -> _Copy:
    copy = _Copy(world.folder / name)
    command = [str(postgres_binaries() / "pg_basebackup"), "-D", str(copy.data_dir), "-U", "postgres", "-c", "fast"]
    command += ["-h", str(world.postgres._sockets_in()), "-p", str(world.postgres.port), "-X", "stream", *options]
    world.folder.chmod(0o777)  # the server's account writes it
    await asyncio.to_thread(lambda: subprocess.run(command, check=True, capture_output=True, timeout=60, **_identity()))
    world.folder.chmod(0o711)
    return copy


async def _take_over(world: World, copy: _Copy, known_until: float) -> None:
    """Send everybody to `copy`, and forget what it never heard of."""
    old, world.postgres = world.postgres, copy
    await world.network.aim("*:database", f"{copy._sockets_in()}/.s.PGSQL.{copy.port}")
    world.also_stop(old)
    world.rewound = Fault("rewound", known_until - 0.5, time.time() + 1, rewinds=True)


_PROXIED = Plan(proxied=True)


@scenario(_PROXIED, within=40)
async def standby_promoted(world: World) -> None:
    """The primary dies while its standby lags a second behind."""
    standby = await _backup(world, "standby", "-R")
    await asyncio.to_thread(standby.start)
    world.also_stop(standby)
    await world.wait(2)
    receiver = next(
        each for each in psutil.Process(standby.pid).children() if "walreceiver" in " ".join(each.cmdline())
    )
    os.kill(receiver.pid, signal.SIGSTOP)
    known_until = time.time()
    await world.wait(1.5)
    await asyncio.to_thread(world.postgres.kill)
    os.kill(receiver.pid, signal.SIGCONT)
    await asyncio.to_thread(standby.sql, "SELECT pg_promote()")
    await _take_over(world, standby, known_until)
    await world.wait(2)


@scenario(_PROXIED, within=40)
async def postgres_restored(world: World) -> None:
    """PostgreSQL is restored to a few seconds ago, and the broker is not flushed."""
    await world.wait(1.5)
    known_until = time.time()
    backup = await _backup(world, "backup")
    await world.wait(3)
    await asyncio.to_thread(world.postgres.kill)
    await asyncio.to_thread(backup.start)
    await _take_over(world, backup, known_until)
    await world.wait(2)
