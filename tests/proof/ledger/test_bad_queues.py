"""A queue that takes nothing costs the others nothing, whatever is wrong with it and whatever it is called."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import redis.asyncio

from tests.proof.ledger import domain
from tests.proof.ledger.looks import dispatched
from tests.servers.proxy import Link, Proxy, proxy, socket_of
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from service.dev.valkey import Valkey
    from service.settings import Settings
    from tests.proof.ledger.conftest import Ledger

pytestmark = pytest.mark.slow

INTO = """
INSERT INTO outbox_message (id, event_id, event_type, version, consumer, queue, payload, headers)
VALUES ($1, $1, 'ledger.happened', 1, 'ledger.react', $2, '{}', '{}')
"""


@asynccontextmanager
async def behind_a_proxy(settings: Settings, valkey: Valkey) -> AsyncIterator[Proxy]:
    """Valkey behind a proxy, for whoever uses the settings."""
    async with proxy(socket_of(valkey.url)) as between:
        settings.broker.url = type(settings.broker.url)(f"redis://127.0.0.1:{between.port}/0")
        yield between


async def test_a_queue_whose_keys_are_forbidden_starves_no_other(
    ledger: Ledger, settings: Settings, own_valkey: Valkey
) -> None:
    settings.broker.url = type(settings.broker.url)(own_valkey.url)
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client:
        name = settings.broker.namespace
        await client.execute_command(
            "ACL", "SETUSER", "default", "resetkeys", f"~{name}:other*", f"~{name}:__outbox_probe__"
        )
        forbidden, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
        async with relaying(settings):
            await until(lambda: dispatched(ledger, fine))
            row = await ledger.row(forbidden)
            assert row is not None
            assert (row["state"], row["dispatches"]) == ("pending", 0)
            await client.execute_command("ACL", "SETUSER", "default", "allkeys")
            await until(lambda: dispatched(ledger, forbidden))


async def test_a_queue_over_which_the_connection_breaks_starves_no_other(
    ledger: Ledger, settings: Settings, own_valkey: Valkey
) -> None:
    """An error of the whole broker, one would think; but it answers as soon as it is asked something else."""
    cut: list[float] = []

    async def cut_at_ledger(link: Link, chunk: bytes) -> bytes:
        if b":ledger" in chunk:
            cut.append(time.monotonic())
            link.cut()
            return b""
        return chunk

    async with behind_a_proxy(settings, own_valkey) as between:
        between.request = cut_at_ledger
        async with relaying(settings):
            for _ in range(3):
                broken, fine = await ledger.publish(domain.FannedOut(subject_id=uuid4()))
                await until(lambda: dispatched(ledger, fine))  # noqa: B023
            assert await ledger.state(broken) == "pending"
            await until(lambda: len(cut) > 3)
            assert cut[3] - cut[0] > 0.125 + 0.25 + 0.5
            between.allow_all()
            await until(lambda: dispatched(ledger, broken))


async def test_slow_queues_take_turns(ledger: Ledger, settings: Settings, own_valkey: Valkey) -> None:
    """A round ends when it is time to look again; the next one goes on where it ended."""
    settings.outbox.batch_size = 1

    async def slowly(_link: Link, chunk: bytes) -> bytes:
        await asyncio.sleep(0.7)  # the fault itself
        return chunk

    for queue in ("a", "b", "c"):
        for _ in range(40):
            last = uuid4()
            await ledger.connection.execute(INTO, last, queue)
    async with behind_a_proxy(settings, own_valkey) as between:
        between.reply = slowly
        async with relaying(settings):
            await until(lambda: any_dispatched(ledger, "c"))


async def any_dispatched(ledger: Ledger, queue: str) -> bool:
    return bool(
        await ledger.connection.fetchval(
            "SELECT count(*) FROM outbox_message WHERE queue = $1 AND state = 'dispatched'", queue
        )
    )


async def test_a_queue_that_hangs_holds_no_other_up(ledger: Ledger, settings: Settings, own_valkey: Valkey) -> None:
    """It costs the others its time-out once; after that it is tried apart from them."""
    hanging = 0

    async def hang_at_ledger(_link: Link, chunk: bytes) -> bytes:
        nonlocal hanging
        if b":ledger" in chunk:
            hanging += 1
            return b""
        return chunk

    async with behind_a_proxy(settings, own_valkey) as between:
        between.request = hang_at_ledger
        settings.broker.publish_timeout = 8
        async with relaying(settings):
            (stuck,) = await ledger.publish()
            await until(lambda: hanging == 2)
            fine = uuid4()
            await ledger.connection.execute(INTO, fine, "other")
            await until(lambda: dispatched(ledger, fine), timeout=7)
            assert hanging == 2
            between.allow_all()
            await until(lambda: dispatched(ledger, stuck))


async def test_a_pause_during_a_long_hand_over_is_honoured_after_it(
    ledger: Ledger, settings: Settings, own_valkey: Valkey
) -> None:
    hanging = 0

    async def hang_at_ledger(_link: Link, chunk: bytes) -> bytes:
        nonlocal hanging
        if b":ledger" in chunk:
            hanging += 1
            return b""
        return chunk

    async with behind_a_proxy(settings, own_valkey) as between:
        between.request = hang_at_ledger
        settings.broker.publish_timeout = 2
        paused = uuid4()
        await ledger.connection.execute(INTO, paused, "other")
        await ledger.connection.execute("UPDATE outbox_message SET due_at = clock_timestamp() + interval '1 hour'")
        await ledger.publish()
        async with relaying(settings):
            await until(lambda: hanging == 1)
            await ledger.connection.execute("INSERT INTO paused_queue (queue, paused_by) VALUES ('other', 'test')")
            await ledger.expire(paused)
            await until(lambda: hanging == 2)
            assert await ledger.state(paused) == "pending"
