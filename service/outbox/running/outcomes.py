"""What may become of a run, and how it is written into the row; `runner.py` decides which it is, death among them.

What must stay true: every outcome may be written late or twice. Each statement matches the claim's token and the state
it comes from, so where the row is somebody else's by then, nothing is written.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from service.ledger import delivering
from service.outbox.consumers import Fail, Retry, consumer_named
from service.outbox.running.failures import describe, said, trace
from service.telemetry.logs import get_logger
from service.text import storable

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.delivering import Claim

_log = get_logger(__name__)

_REASON_LENGTH = 500


@dataclass(frozen=True, slots=True)
class Completed:
    """The effect and the delivery's completion are committed."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The delivery is somebody else's; the effect was rolled back."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The consumer came back without `begin()`: its effect is outside, or there was nothing to do."""


@dataclass(frozen=True, slots=True)
class Expired:
    """It was claimed too late, and not run."""


@dataclass(frozen=True, slots=True)
class Failed:
    """It is retried after `delay`."""

    error: BaseException
    delay: timedelta


@dataclass(frozen=True, slots=True)
class Dead:
    """It becomes a dead letter."""

    error: BaseException
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """Not the consumer's fault: the attempt is refunded."""

    error: BaseException | None = None
    delay: timedelta = timedelta()


@dataclass(frozen=True, slots=True)
class Suspected:
    """An outage or the delivery's own doing; the attempt is refunded until that was done too often."""

    error: BaseException
    delay: timedelta
    otherwise: Failed | Dead


@dataclass(frozen=True, slots=True)
class Unknown:
    """Not for this worker's code: the attempt is refunded, for a day."""

    error: BaseException
    delay: timedelta


Unwritten = Finished | Expired | Failed | Dead | Released | Suspected | Unknown
"""What the row does not show yet."""

Outcome = Completed | Lost | Unwritten
"""What became of a run."""


class _UnstorableError(Exception):
    """Stands in for an error that cannot be stored as it is."""


def unstorable(outcome: Unwritten, refusal: Exception) -> Unwritten:
    """The same outcome in plain words of ours.

    Args:
        outcome: What cannot be written for what stands in it, however often it is tried.
        refusal: How that showed.
    """
    error = _UnstorableError(f"what went wrong could not be stored ({type(refusal).__name__}); the worker's log has it")
    error.__cause__ = getattr(outcome, "error", None)
    match outcome:
        case Dead():
            return Dead(error, str(error))
        case Suspected(otherwise=Failed() as failed):
            return replace(outcome, error=error, otherwise=replace(failed, error=error))
        case Suspected(otherwise=Dead()):
            return replace(outcome, error=error, otherwise=Dead(error, str(error)))
        case Failed() | Unknown() | Released(error=BaseException()):
            return replace(outcome, error=error)
    return outcome


async def write(connection: Connection, claim: Claim, outcome: Unwritten, patience: timedelta) -> str:
    """Write an outcome into the row, unless the row is not the claim's any more.

    Args:
        connection: In no transaction, or in one of its own.
        claim: The run.
        outcome: What became of it.
        patience: For how long a row waits for a worker that knows its consumer.

    Returns:
        What it came to, in the words of the statistics.
    """
    match outcome:
        case Finished():
            return log_completed(claim) if await delivering.complete(connection, claim) else log_lost(claim)
        case Expired():
            if not await delivering.expire(connection, claim):
                return log_lost(claim)
            _log.info("outbox.expired", consumer=claim.consumer, delivery_id=str(claim.id))
            return "expired"
        case Failed() | Dead():
            return await _write_failure(connection, claim, outcome)
        case Released(error, delay):
            document = None if error is None else describe(error, claim.payload)
            await delivering.release(connection, claim, error=document, delay=delay)
            name = None if error is None else type(error).__name__
            _log.info("outbox.released", consumer=claim.consumer, error=name)
            return "released"
        case Suspected(error, delay, otherwise):
            if await delivering.forgive(connection, claim, describe(error, claim.payload), delay):
                _log.warning("outbox.forgiven", consumer=claim.consumer, error=type(error).__name__)
                return "released"
            return await _write_failure(connection, claim, otherwise)
        case Unknown(error, delay):
            document = describe(error, claim.payload)
            overdue = await delivering.postpone(connection, claim, document, delay, patience)
            _log.info("outbox.postponed", consumer=claim.consumer, reason=said(error))
            if not overdue:
                return "unknown"
            reason = storable(said(error), _REASON_LENGTH)
            died = await delivering.die(connection, claim, document, reason, states=("pending",), skip=_skips(claim))
            return "dead" if died else "lost"


async def _write_failure(connection: Connection, claim: Claim, failure: Failed | Dead) -> str:
    error = failure.error
    document = describe(error, claim.payload)
    shown: dict[str, Any] = {"attempt": claim.attempts, "error": type(error).__name__}
    if not isinstance(error, Retry | Fail):  # what a consumer raised to steer needs no traceback
        shown["exception"] = trace(error, claim.payload)
    if isinstance(failure, Failed):
        delay = failure.delay
        if await delivering.fail(connection, claim, document, delay):
            _log.warning("outbox.failed", retry_in=delay.total_seconds(), **shown)
            return "failed"
        return log_lost(claim)
    reason = storable(failure.reason, _REASON_LENGTH)
    spec = consumer_named(claim.consumer)
    told = None if spec is None or spec.on_dead is None else spec.on_dead.name
    if number := await delivering.die(connection, claim, document, reason, skip=_skips(claim), tell=told):
        _log.error("outbox.dead_lettered", dead_letter=number, reason=reason, **shown)
        return "dead"
    return log_lost(claim)


def _skips(claim: Claim) -> bool:
    """Whether its lane goes on without it. Where this code does not know the consumer, the lane stands."""
    spec = consumer_named(claim.consumer)
    return spec is not None and spec.order is not None and spec.order.skips


def log_completed(claim: Claim) -> str:
    """Tell that the effect has happened, and how long it took from the claim; the word for it."""
    _log.info(
        "outbox.completed",
        consumer=claim.consumer,
        delivery_id=str(claim.id),
        attempt=claim.attempts,
        duration_ms=round((time.perf_counter() - claim.began) * 1000, 1),
    )
    return "completed"


def log_lost(claim: Claim) -> str:
    """Tell that the delivery is somebody else's; the word for it."""
    _log.warning("outbox.lease_lost", consumer=claim.consumer, delivery_id=str(claim.id))
    return "lost"
