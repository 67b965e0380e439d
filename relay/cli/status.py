"""How the outbox is doing: what is open per queue and consumer, and whether PostgreSQL, broker and relay are there.

What must stay true: it is cheap however much has been completed. So what is open is counted in the index that holds
nothing else, and what is completed is counted only in a small table, and estimated in a large one. And it changes
nothing, and answers in bounded time whatever is down.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from relay.brokers.factory import make_sender
from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError
from relay.cli.command import CommandError, connect

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from relay.brokers.sender import Sender
    from relay.cli.command import Connection
    from service.settings import BrokerSettings, Settings

__all__ = ["BrokerQueue", "Completed", "Counts", "Pause", "Status", "gather"]

SMALL_TABLE = 64 * 2**20
"""Bytes up to which completed rows are counted."""

UNCLAIMED_AFTER = 3
"""Hand-overs without a claim after which a delivery counts as unclaimed."""

_BROKER_PATIENCE = 3.0
_QUEUE_PATIENCE = 4.0
_QUEUES_PATIENCE = 6.0
"""Seconds that the broker, one queue and all queues may take to answer."""

_AT_ONCE = 16
"""Queues asked about at the same time; each needs a connection where the broker is RabbitMQ."""

_OPEN = f"""
SELECT queue, consumer,
       count(*) FILTER (WHERE state = 'pending') AS pending,
       count(*) FILTER (WHERE state = 'dispatched') AS dispatched,
       count(*) FILTER (WHERE state = 'running') AS running,
       count(*) FILTER (WHERE state = 'pending' AND errors <> '[]') AS failed,
       count(*) FILTER (WHERE state = 'dispatched' AND dispatches - attempts >= {UNCLAIMED_AFTER}) AS unclaimed,
       extract(epoch FROM clock_timestamp() - min(due_at) FILTER (WHERE due_at <= now()))::float8 AS oldest
FROM outbox_message WHERE state <> 'completed' GROUP BY queue, consumer
"""  # noqa: S608
_DEAD = "SELECT queue, consumer, count(*) AS dead FROM dead_letter WHERE resolution IS NULL GROUP BY queue, consumer"
_COMPLETED = """
SELECT queue, consumer, count(*) AS completed FROM outbox_message WHERE state = 'completed' GROUP BY queue, consumer
"""
_SIZE = """
SELECT pg_relation_size(oid) AS bytes, reltuples::bigint AS rows FROM pg_class WHERE oid = 'outbox_message'::regclass
"""
_PAUSED = (
    "SELECT queue, paused_at, clock_timestamp() - paused_at AS age, paused_by, why FROM paused_queue ORDER BY queue"
)
_RELAYS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND split_part(application_name, ' ', 1) = 'outbox-relay'
"""


@dataclass(slots=True)
class Counts:
    """Deliveries of one consumer. `failed` are those of `pending` that wait for a retry; `oldest` is in seconds."""

    pending: int = 0
    dispatched: int = 0
    running: int = 0
    failed: int = 0
    unclaimed: int = 0
    dead: int = 0
    completed: int | None = None
    oldest: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether any is still to be done."""
        return bool(self.pending or self.dispatched or self.running)

    def update(self, counted: dict[str, Any]) -> None:
        for name, value in counted.items():
            setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Completed:
    """All completed rows; `count` is `None` before the table was first analyzed."""

    count: int | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """A paused queue."""

    queue: str
    paused_at: datetime
    age: timedelta
    paused_by: str
    why: str | None


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
    relays: int = 0
    consumers: dict[tuple[str, str], Counts] = field(default_factory=dict)
    completed: Completed = Completed(None, True)
    paused: list[Pause] = field(default_factory=list)
    queues: dict[str, BrokerQueue] = field(default_factory=dict)

    def total(self, name: str) -> int:
        return sum(getattr(each, name) or 0 for each in self.consumers.values())

    @property
    def oldest(self) -> float | None:
        return max((each.oldest for each in self.consumers.values() if each.oldest is not None), default=None)


async def gather(settings: Settings, *, exact: bool = False) -> Status:
    """Ask PostgreSQL and the broker, neither of which need be there."""
    status = Status(_address(settings.broker))
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
    names = {queue for (queue, _), counts in status.consumers.items() if counts.is_open}
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
        async with connect(settings.database) as connection, connection.transaction(readonly=True):
            # A snapshot of a whole: every number below is of the same moment.
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await connection.execute("SET LOCAL statement_timeout = '60s'")
            await _count(status, connection, exact)
    except CommandError as problem:
        status.database_problem = str(problem)


async def _count(status: Status, connection: Connection, exact: bool) -> None:
    size = await connection.fetchrow(_SIZE)
    assert size is not None
    counted = exact or size["bytes"] <= SMALL_TABLE
    if counted:
        await _add(status, connection, _COMPLETED)
    # The statistics of a table that was just filled would have the whole of it read for the few rows that are open.
    await connection.execute("SET LOCAL enable_seqscan = off")
    await _add(status, connection, _OPEN)
    await _add(status, connection, _DEAD)
    status.paused = [Pause(**row) for row in await connection.fetch(_PAUSED)]
    status.relays = await connection.fetchval(_RELAYS)
    if counted:
        for each in status.consumers.values():
            each.completed = each.completed or 0
        status.completed = Completed(status.total("completed"), estimated=False)
    elif size["rows"] >= 0:
        still_open = sum(status.total(name) for name in ("pending", "dispatched", "running"))
        status.completed = Completed(max(size["rows"] - still_open, 0), estimated=True)


async def _add(status: Status, connection: Connection, statement: str) -> None:
    for row in await connection.fetch(statement):
        counted = dict(row)
        key = counted.pop("queue"), counted.pop("consumer")
        status.consumers.setdefault(key, Counts()).update(counted)


async def _ping(sender: Sender, address: str) -> str | None:
    try:
        async with asyncio.timeout(_BROKER_PATIENCE):
            await sender.ping()
    except (BrokerUnavailableError, QueueRefusedError) as error:
        return f"cannot use the broker at {address} ({error}): is it running, and is BROKER__URL right?"
    except TimeoutError:
        return f"the broker at {address} does not answer within {_BROKER_PATIENCE:.0f} s"
    return None


def _address(settings: BrokerSettings) -> str:
    """The broker's URL without user and password."""
    url = urlsplit(settings.url.get_secret_value())
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
