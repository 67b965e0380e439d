"""Strikes inside the processes, at the gaps between two steps that belong together.

`CHAOS_GAPS` is `gap=action:chance,...`; an action is `kill` (SIGKILL to itself), `stop` (SIGSTOP, until somebody sends
SIGCONT) or `sleep` (blocks the whole process for half a second). They strike while the file `CHAOS_ARMED` exists, and
say so in the file `CHAOS_STRIKES` first.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

from tests.chaos.patching import when_imported

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
_dice: dict[int, random.Random] = {}


def strike(gap: str) -> None:
    """Do to this process what `CHAOS_GAPS` says, if the dice say so."""
    action, chance = _GAPS.get(gap, ("", 0.0))
    pid = os.getpid()
    dice = _dice.setdefault(pid, random.Random(f"{os.environ.get('CHAOS_SEED', '')} {pid}"))
    if not action or dice.random() >= chance or not os.path.exists(os.environ["CHAOS_ARMED"]):  # noqa: PTH110
        return
    line = json.dumps({"at": time.time(), "pid": pid, "gap": gap, "action": action})
    with open(os.environ["CHAOS_STRIKES"], "a") as file:  # noqa: PTH123  one short write, whole or not at all
        file.write(line + "\n")
    match action:
        case "kill":
            os.kill(pid, signal.SIGKILL)
        case "stop":
            os.kill(pid, signal.SIGSTOP)
        case "sleep":
            time.sleep(0.5)


def _around(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @functools.wraps(inner)
    async def struck(*args: Any, **kwargs: Any) -> Any:
        strike(before)
        result = await inner(*args, **kwargs)
        strike(after)
        return result

    setattr(owner, name, struck)


def _around_sync(owner: Any, name: str, before: str = "", after: str = "") -> None:
    inner: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(inner)
    def struck(*args: Any, **kwargs: Any) -> Any:
        strike(before)
        result = inner(*args, **kwargs)
        strike(after)
        return result

    setattr(owner, name, struck)


@when_imported("service.database")
def _api(module: Any) -> None:
    _around(module, "commit", "api.before_commit", "api.after_commit")


@when_imported("relay.redis_publisher")
def _redis(module: Any) -> None:
    _around(module.RedisPublisher, "publish", "relay.before_publish", "relay.after_publish")


@when_imported("relay.rabbitmq_publisher")
def _rabbitmq(module: Any) -> None:
    _around(module.RabbitmqPublisher, "publish", "relay.before_publish", "relay.after_publish")


@when_imported("relay.loop")
def _relay(module: Any) -> None:
    _around(module.Relay, "_dispatch", after="relay.after_dispatch")


@when_imported("service.outbox.statements")
def _statements(module: Any) -> None:
    _around(module, "claim", "worker.before_claim", "worker.after_claim")
    _around(module, "complete", "worker.before_complete", "worker.after_complete")
    _around(module, "complete_in_transaction", "worker.before_complete", "worker.after_complete")


@when_imported("service.outbox.delivery")
def _delivery(module: Any) -> None:
    _around(module.AsyncSession, "commit", after="worker.after_commit")


@when_imported("tests.chaos.domain")
def _domain(module: Any) -> None:
    _around(module, "write_booking", after="worker.mid_effect")
    _around(module, "tell_sink", after="worker.after_send")
    _around_sync(module, "tell_sink_blocking", after="worker.after_send")


@when_imported("service.doorbell")
def _doorbell(module: Any) -> None:
    _around_sync(module._DoorbellConsumer, "ack", before="worker.before_ack")


@when_imported("service.broker")
def _broker(module: Any) -> None:
    _around_sync(module._CarefulConsumer, "ack", before="worker.before_ack")
