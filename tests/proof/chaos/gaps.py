"""Strikes inside the processes, at the gaps between two steps that belong together.

`CHAOS_GAPS` is `gap=action:chance,...`; an action is `kill` (SIGKILL to itself), `stop` (SIGSTOP, until somebody sends
SIGCONT), `sleep` (blocks the whole process for half a second), `drop` (its connections to the database and the broker
break) or `note` (nothing but the note). They strike while the file `CHAOS_ARMED` names the gap; with `once` in it, one
process does so once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tests.proof.chaos.patching import replace, when_imported
from tests.proof.chaos.strikes import dice, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["API_GAPS", "RELAY_GAPS", "WORKER_GAPS"]

API_GAPS = ("api.before_commit", "api.after_commit")
RELAY_GAPS = ("relay.before_publish", "relay.after_publish", "relay.after_dispatch")
WORKER_GAPS = (
    "worker.before_claim",
    "worker.after_claim",
    "worker.mid_effect",
    "worker.after_send",
    "worker.before_complete",
    "worker.after_complete",
    "worker.after_commit",
    "worker.before_ack",
)


def _parsed(gaps: str) -> dict[str, tuple[str, float]]:
    parts = (each.partition("=") for each in gaps.split(",") if each)
    return {gap: (what.partition(":")[0], float(what.partition(":")[2])) for gap, _, what in parts}


_GAPS = _parsed(os.environ.get("CHAOS_GAPS", ""))


def strike(gap: str) -> None:
    """Do to this process what `CHAOS_GAPS` says, if the dice say so."""
    action, chance = _GAPS.get(gap, ("", 0.0))
    if not action or dice().random() >= chance or not _armed(gap):
        return
    record(gap, action)
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(0.5)
        case "drop":
            _drop()


def _armed(gap: str) -> bool:
    try:
        with open(os.environ["CHAOS_ARMED"]) as file:  # noqa: PTH123
            armed = json.load(file)
        if gap not in armed["gaps"]:
            return False
        if armed["once"]:
            os.unlink(os.environ["CHAOS_ARMED"])  # noqa: PTH108  whoever removes it is the one
    except FileNotFoundError:
        return False
    return True


def _drop() -> None:
    """Break every connection to the database and the broker; whoever uses one finds out then."""
    ports = {urlsplit(os.environ[name]).port for name in ("DATABASE__URL", "BROKER__URL")}
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with suppress(OSError, ValueError), socket.socket(fileno=os.dup(int(number))) as connection:
            if connection.family == socket.AF_INET and connection.getpeername()[1] in ports:
                connection.shutdown(socket.SHUT_RDWR)


def _around(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @functools.wraps(inner)
    async def struck(*args: Any, **kwargs: Any) -> Any:
        strike(before)
        result = await inner(*args, **kwargs)
        strike(after)
        return result

    replace(owner, name, struck)


def _around_sync(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def struck(*args: Any, **kwargs: Any) -> Any:
        strike(before)
        result = inner(*args, **kwargs)
        strike(after)
        return result

    replace(owner, name, struck)


@when_imported("service.database.sessions")
def _api(module: Any) -> None:
    _around(module, "commit", "api.before_commit", "api.after_commit")


@when_imported("relay.brokers.redis_sender")
def _redis(module: Any) -> None:
    _around(module.RedisSender, "hand_over", "relay.before_publish", "relay.after_publish")


@when_imported("relay.brokers.rabbitmq_sender")
def _rabbitmq(module: Any) -> None:
    _around(module.RabbitmqSender, "hand_over", "relay.before_publish", "relay.after_publish")


@when_imported("relay.process.loop")
def _relay(module: Any) -> None:
    inner = module.Relay._dispatch

    @functools.wraps(inner)
    async def dispatch(*args: Any, **kwargs: Any) -> Any:
        moved = await inner(*args, **kwargs)
        if moved:
            strike("relay.after_dispatch")
        return moved

    replace(module.Relay, "_dispatch", dispatch)


@when_imported("service.ledger.delivering")
def _statements(module: Any) -> None:
    for name in ("claim", "claim_free"):
        _around(module, name, "worker.before_claim", "worker.after_claim")
    for name in ("complete", "complete_in_transaction"):
        _around(module, name, "worker.before_complete", "worker.after_complete")


@when_imported("service.ledger.batch_claims")
def _batches(module: Any) -> None:
    _around(module, "claim", "worker.before_claim", "worker.after_claim")
    for name in ("complete", "complete_in_transaction"):
        _around(module, name, "worker.before_complete", "worker.after_complete")


@when_imported("service.outbox.delivery")
def _delivery(module: Any) -> None:
    _around(module, "commit", after="worker.after_commit")


@when_imported("tests.proof.chaos.domain")
def _domain(module: Any) -> None:
    _around(module, "write_booking", after="worker.mid_effect")
    _around(module, "write_turn", after="worker.mid_effect")
    _around(module, "tell_sink", after="worker.after_send")
    _around_sync(module, "tell_sink_blocking", after="worker.after_send")


@when_imported("service.worker.doorbell")
def _doorbell(module: Any) -> None:
    _around_sync(module._DoorbellConsumer, "ack", before="worker.before_ack")


@when_imported("service.worker.dramatiq_broker")
def _broker(module: Any) -> None:
    _around_sync(module._CarefulConsumer, "ack", before="worker.before_ack")
