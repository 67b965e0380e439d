"""The checks of the broker, of processes and what waits for them, and of the addresses that the settings name."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from aiormq import AMQPError
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError, RedisError

from relay.brokers.rabbitmq_channel import OneChannel
from relay.cli.doctor.findings import Finding, Level, found
from relay.cli.output import age
from relay.cli.status import gather
from service.database.driver import DRIVER_ERRORS
from service.ledger import statistics
from service.ledger.diagnosis import look
from service.ledger.pausing import EVERY_QUEUE
from service.network.urls import is_local

if TYPE_CHECKING:
    from collections.abc import Sequence

    from relay.cli.status import Status
    from service.ledger.statistics import SeenProcess
    from service.settings import BrokerSettings, DatabaseSettings, Settings

LATE = 300.0
"""Seconds for which something may be due."""

_PATIENCE = 5.0
_RELAY = "start one: outbox relay"
_WORKER = "start one: dramatiq service.worker:setup_broker -Q {}"
_ENCRYPTED = ("rediss", "valkeys", "amqps", "smtps", "smtp+starttls")


async def check_broker_and_queues(settings: Settings) -> list[Finding]:
    """Ask both, neither of which need be there."""
    # Without prepared statements, as there may be a pooler.
    unprepared = settings.database.model_copy(update={"pooler": True})
    status, alive = await asyncio.gather(
        gather(settings.model_copy(update={"database": unprepared})), _reporting(settings.database)
    )
    idle = _unserved(status, alive)
    if status.broker_problem:
        return [
            Finding("broker", Level.PROBLEM, status.broker_problem),
            *_processes(status, alive),
            *_queues(status, idle),
            *_lanes(status),
        ]
    try:
        async with asyncio.timeout(_PATIENCE):
            if settings.broker.is_rabbitmq:
                idle |= await _without_worker(settings.broker, status)
                broker = [Finding("broker", Level.OK, "RabbitMQ takes messages; its queues are durable")]
            else:
                broker = await _redis(settings.broker)
    except NoPermissionError:
        broker = [Finding("broker", Level.UNKNOWN, "not checked: this user may not run INFO")]
    except (AMQPError, RedisError, OSError) as error:
        seen = f"not checked: {str(error)[:200] or type(error).__name__}"
        broker = [Finding("broker", Level.PROBLEM, seen, "look into its log, and try again")]
    return [*broker, *_processes(status, alive), *_queues(status, idle), *_lanes(status)]


async def _reporting(settings: DatabaseSettings) -> list[SeenProcess]:
    """Relays and workers that have reported just now; none if that cannot be asked, which others tell of."""
    try:
        async with look(settings) as connection:
            return await statistics.processes(connection)
    except DRIVER_ERRORS:
        return []


def _unserved(status: Status, alive: Sequence[SeenProcess]) -> set[str]:
    """The queues that have open deliveries and no worker process. None, where processes are too old to report."""
    if not alive:
        return set()
    served = {queue for each in alive if each.kind == "worker" for queue in each.queues}
    return {queue for (queue, _), counts in status.ledger.consumers.items() if counts.is_open} - served


def _processes(status: Status, alive: Sequence[SeenProcess]) -> list[Finding]:
    if not alive:
        return [
            Finding("processes", Level.UNKNOWN, "none has reported for 45 s: none runs, or none of a version that does")
        ]
    kinds, connected = Counter(each.kind for each in alive), status.ledger.relays
    versions = Counter((each.version or "unnamed", each.kind) for each in alive)
    told = ", ".join(
        f"{version} ({count} {kind}{'s' * (count > 1)})" for (version, kind), count in sorted(versions.items())
    )
    names = sorted({each.version for each in alive})
    seen = f"relays: {kinds['relay']}, worker processes: {kinds['worker']}" + f", all of {names[0]}" * bool(names[0])
    return found("processes", seen, (
        (len(names) > 1, Level.ADVICE, f"versions side by side: {told}",
         "in the midst of a deploy that is in order; after it, replace the old ones"),
        (connected > kinds["relay"], Level.ADVICE,
         f"relays: {connected} connected, {kinds['relay']} reported within 45 s",
         "restart what hangs, if it is not of a version that does not report"),
    ))  # fmt: skip


def _queues(status: Status, idle: set[str]) -> list[Finding]:
    if status.database_problem:
        return [Finding("queues", Level.UNKNOWN, f"not checked: {status.database_problem}")]
    paused = {each.queue for each in status.ledger.paused}
    limited = {each.queue for each in status.ledger.limited}
    late = {
        queue: f"something in {queue} has been due for {age(counts.oldest)}"
        for (queue, _), counts in sorted(status.ledger.consumers.items(), key=lambda each: each[1].oldest or 0)
        if (counts.oldest or 0) > LATE and not paused & {queue, EVERY_QUEUE} and queue not in limited
    }
    idle |= {queue for (queue, _), counts in status.ledger.consumers.items() if counts.unclaimed}
    idle -= paused if EVERY_QUEUE not in paused else idle
    refused = [(name, each.problem) for name, each in status.queues.items() if each.state == "refused"]
    slow = "a relay or workers are missing or too slow: outbox status"
    anew = "delete it there: it is declared anew, and what was in it is handed over again"
    return found("queues", f"nothing waits in vain; relays: {status.ledger.relays}", [
        (not status.ledger.relays, Level.PROBLEM if late else Level.ADVICE, "no relay is connected", _RELAY),
        *((True, Level.PROBLEM, seen, slow) for seen in late.values()),
        *((True, Level.PROBLEM, f"no worker takes what is in {name}", _WORKER.format(name)) for name in sorted(idle)),
        *((True, Level.PROBLEM, f"the broker refuses {name}: {why}", anew) for name, why in refused),
    ])  # fmt: skip


def _lanes(status: Status) -> list[Finding]:
    if status.database_problem:
        return []
    blocked, stranded = status.ledger.blocked, status.ledger.stranded
    return found("lanes", "none stands", (
        (stranded, Level.PROBLEM, f"stranded: {stranded}, where something waits for nothing", "outbox lanes repair"),
        (blocked, Level.ADVICE, f"standing for a dead letter: {blocked}", "replay or discard it: outbox lanes list"),
    ))  # fmt: skip


async def _redis(settings: BrokerSettings) -> list[Finding]:
    options: dict[str, Any] = settings.redis_options
    async with Redis.from_url(settings.redis_url, **options, socket_timeout=_PATIENCE) as client:
        info = await client.info()
    policy, most, used = info.get("maxmemory_policy", "noeviction"), info.get("maxmemory"), info.get("used_memory", 0)
    memory = f"{used / 1e6:,.0f} of {most / 1e6:,.0f} MB in use" if most else "without a limit of memory"
    # Nothing of ours expires, so a policy for what does expire leaves it alone.
    level = Level.PROBLEM if policy.startswith("allkeys") else Level.ADVICE
    return found("broker", f"{info.get('server_name', 'redis')}, append-only, {policy}, {memory}", (
        (policy != "noeviction", level, f"maxmemory-policy {policy} evicts queues when memory is short",
         "set maxmemory-policy noeviction, by CONFIG SET and in the configuration file"),
        (most and used > 0.8 * most, Level.ADVICE, memory, "raise maxmemory, or lower OUTBOX__HIGH_WATER_MARK"),
        (not info.get("aof_enabled"), Level.ADVICE, "a restart forgets what waits; it starts a minute or more later",
         "set appendonly yes, by CONFIG SET and in the configuration file"),
    ))  # fmt: skip


async def _without_worker(settings: BrokerSettings, status: Status) -> set[str]:
    """The queues that have open deliveries and no consumer."""
    connection = OneChannel(settings)
    try:
        channel = await connection.open()
        names = [name for name, queue in status.queues.items() if queue.state in ("ok", "full")]
        return {name for name in names if not (await channel.queue_declare(name, passive=True)).consumer_count}
    finally:
        await connection.close()


def check_encryption(settings: Settings) -> list[Finding]:
    """Whether the URLs of broker and mail server ask for TLS."""
    findings = []
    for name, secret in (("broker", settings.broker.url), ("smtp", settings.smtp.url)):
        url = urlsplit(secret.get_secret_value())
        encrypted = url.scheme in _ENCRYPTED or (url.scheme == "smtp" and url.password)
        near, variable = url.scheme == "unix" or is_local(url.hostname or ""), f"{name.upper()}__URL"
        better = "rediss://, valkeys:// or amqps://" if name == "broker" else "smtp+starttls:// or smtps://"
        findings += found(f"tls {name}", "asked for" if encrypted else "not encrypted, on one machine", (
            (not encrypted and not near, Level.ADVICE, "not encrypted, over a network", f"use {better} in {variable}"),
            (encrypted and "ssl_cert_reqs=none" in url.query, Level.ADVICE, "asked for, of whoever answers",
             f"remove ssl_cert_reqs from {variable}"),
        ))  # fmt: skip
    return findings
