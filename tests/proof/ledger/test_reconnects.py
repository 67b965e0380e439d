"""A relay outlives every connection, takes no lease from a healthy worker, and gives up on no lost one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from relay.process.sparing import Sparing
from relay.process.wakeup import Wakeup
from service.errors import ConfigurationError
from tests.proof.ledger.looks import dispatched, sleeping
from tests.servers.proxy import Link, through_a_proxy
from tests.servers.relaying import relaying
from tests.waiting import until

if TYPE_CHECKING:
    from service.settings import Settings
    from tests.proof.ledger.conftest import Connect, Ledger

pytestmark = pytest.mark.slow


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof that notifications arrive takes seconds; here it may take less."""
    monkeypatch.setattr("relay.process.wakeup._PATIENCE", (0.5, 0.5))
    monkeypatch.setattr("relay.process.wakeup._ANSWER", 0.5)


def listens(link: Link) -> bool:
    return b"LISTEN" in link.asked


async def test_a_postgres_that_stands_still_at_the_start_is_waited_for(
    ledger: Ledger, settings: Settings, impatient: None
) -> None:
    """After the proof was asked for: what is not told then is no pooler's fault."""
    go_on = asyncio.Event()

    async def stand_still(link: Link, chunk: bytes) -> bytes:
        if b"pg_notify" in b"".join(each.asked for each in between.links) and listens(link):
            await go_on.wait()
        return chunk

    (message_id,) = await ledger.publish()
    async with through_a_proxy(settings) as between:
        between.reply = stand_still
        async with relaying(settings):
            await until(lambda: sum(map(listens, between.links)) >= 2)
            go_on.set()
            await until(lambda: dispatched(ledger, message_id))


async def test_a_connection_that_ends_while_it_is_proved_is_an_ended_connection(connect: Connect) -> None:
    listener = await connect()
    killer = await connect()

    class Killing:
        """Another session, at whose notification the listening one has just ended."""

        async def execute(self, *_: object, **__: object) -> None:
            await killer.execute("SELECT pg_terminate_backend($1)", listener.get_server_pid())

    with pytest.raises(ConnectionError):
        async with asyncio.timeout(30):
            await Wakeup(listener).open(Killing())  # type: ignore[arg-type]


async def swallow_notifications(_link: Link, chunk: bytes) -> bytes:
    """As a pooler in transaction mode does: it passes on what belongs to a request."""
    return b"" if chunk.startswith(b"A") else chunk


async def test_a_relay_that_is_never_told_refuses_to_start(ledger: Ledger, settings: Settings, impatient: None) -> None:
    async with through_a_proxy(settings) as between:
        between.reply = swallow_notifications
        with pytest.raises(ConfigurationError, match="not told of notifications"):
            async with relaying(settings):
                await until(lambda: len(between.links) > 2)


async def test_a_relay_that_was_told_once_does_not_blame_the_settings(
    ledger: Ledger, settings: Settings, impatient: None
) -> None:
    async with through_a_proxy(settings) as between, relaying(settings):
        await until(lambda: sleeping(ledger))
        between.reply = swallow_notifications
        seen = len(between.links)
        between.links[0].cut()
        await until(lambda: len(between.links) >= seen + 4)
        between.allow_all()
        (message_id,) = await ledger.publish()
        await until(lambda: dispatched(ledger, message_id))


async def test_a_connection_that_breaks_again_and_again_recovers_what_was_lost(
    ledger: Ledger, settings: Settings
) -> None:
    """It breaks more often than half a lease, for which a relay spares what runs after an outage."""
    settings.outbox.lease = 6
    (lost,) = await ledger.publish()
    await ledger.set(lost, state="running", attempts=1)
    await ledger.expire(lost)
    broken = 0
    async with relaying(settings):

        async def recovered() -> bool:
            nonlocal broken
            broken += await ledger.connection.fetchval(
                """SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                   WHERE application_name = 'outbox-relay' AND datname = current_database()
                     AND backend_start < clock_timestamp() - interval '1.5 s'"""
            )
            return await dispatched(ledger, lost)

        await until(recovered)
    assert broken


def test_only_an_outage_that_may_have_outlived_a_lease_spares() -> None:
    sparing = Sparing(lease=8)
    sparing.connected(100)
    assert sparing.active(103.9), "it cannot know how long PostgreSQL was away before"
    sparing.heard(103)
    sparing.connected(104.9)
    assert not sparing.active(104.9), "nobody's lease has ended in two seconds"
    sparing.heard(200)
    sparing.connected(202.1)
    assert sparing.active(206)
    assert not sparing.active(206.2)
