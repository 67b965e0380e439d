"""How the outbox is doing: what is open per queue and consumer, and whether PostgreSQL, broker and relay are there.

What must stay true: it changes nothing, and answers in bounded time whatever is down.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from relay.brokers import make_sender
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError
from relay.cli.command import CommandError, connect
from service.ledger.counting import LedgerCounts, count
from service.network.urls import without_secrets

if TYPE_CHECKING:
    from relay.brokers.sender import Sender
    from service.settings import Settings

_BROKER_PATIENCE = 3.0
_QUEUE_PATIENCE = 4.0
_QUEUES_PATIENCE = 6.0
"""Seconds that the broker, one queue and all queues may take to answer."""

_AT_ONCE = 16
"""Queues asked about at the same time; each needs a connection where the broker is RabbitMQ."""


@dataclass(frozen=True, slots=True)
class BrokerQueue:
    """A queue with open deliveries, in the broker.

    Attributes:
        state: `ok`, `full` (at its mark, so the rest waits in PostgreSQL), `missing`, `refused` or `unknown`.
        waiting: Messages in it, where it says so.
        problem: Why it is refused.
    """

    state: str
    waiting: int | None = None
    problem: str | None = None


@dataclass(slots=True)
class Status:
    """Everything `outbox status` says. A problem is a sentence, `None` when there is none."""

    broker: str
    broker_problem: str | None = None
    database_problem: str | None = None
    ledger: LedgerCounts = field(default_factory=LedgerCounts)
    queues: dict[str, BrokerQueue] = field(default_factory=dict)


async def gather(settings: Settings, *, exact: bool = False) -> Status:
    """Ask PostgreSQL and the broker, neither of which need be there."""
    status = Status(without_secrets(settings.broker.url.get_secret_value()))
    sender = make_sender(settings.broker.model_copy(update={"publish_timeout": _QUEUE_PATIENCE}))
    try:
        status.broker_problem, _ = await asyncio.gather(
            _ping(sender, status.broker), _ask_database(status, settings, exact)
        )
        if status.broker_problem is None:
            await _ask_queues(status, sender, settings.outbox.high_water_mark)
    finally:
        await sender.close()
    return status


async def _ask_queues(status: Status, sender: Sender, mark: int) -> None:
    """Ask the broker about every queue with open deliveries."""
    names = {queue for (queue, _), counts in status.ledger.consumers.items() if counts.is_open}
    status.queues = dict.fromkeys(sorted(names), BrokerQueue("unknown"))
    turn = asyncio.Semaphore(_AT_ONCE)

    async def ask(name: str) -> None:
        async with turn:
            status.queues[name] = await _inspect(sender, name, mark)

    with suppress(TimeoutError):
        async with asyncio.timeout(_QUEUES_PATIENCE):
            await asyncio.gather(*map(ask, names))


async def _inspect(sender: Sender, name: str, mark: int) -> BrokerQueue:
    try:
        waiting = await sender.inspect(name)
    except (BrokerUnavailableError, QueueRefusedError) as error:
        return BrokerQueue("refused", problem=str(error))
    if waiting is None:
        return BrokerQueue("missing")
    return BrokerQueue("full" if waiting >= mark else "ok", waiting)


async def _ask_database(status: Status, settings: Settings, exact: bool) -> None:
    try:
        async with connect(settings.database) as connection:
            status.ledger = await count(connection, exact=exact)
    except CommandError as problem:
        status.database_problem = str(problem)


async def _ping(sender: Sender, address: str) -> str | None:
    try:
        async with asyncio.timeout(_BROKER_PATIENCE):
            await sender.ping()
    except (BrokerUnavailableError, QueueRefusedError) as error:
        return f"cannot use the broker at {address} ({error}): is it running, and is BROKER__URL right?"
    except TimeoutError:
        return f"the broker at {address} does not answer within {_BROKER_PATIENCE:.0f} s"
    return None
