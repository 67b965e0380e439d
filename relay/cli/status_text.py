"""How the status looks on a terminal and as JSON, and the conditions of `--fail-if`."""

from __future__ import annotations

import operator
import re
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from relay.cli.command import CommandError, parse_duration
from relay.cli.output import Column, age, compact, plain, table
from service.ledger.limit_text import said
from service.ledger.pausing import EVERY_QUEUE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from relay.cli.status import Status
    from service.ledger.counting import Counts

METRICS = (
    "pending", "parked", "dispatched", "running", "failed", "unclaimed", "dead", "oldest", "relays", "paused",
    "blocked", "stranded",
)  # fmt: skip
"""What a condition can be about."""

_STATES = {
    "full": "is full: {each.waiting:,} wait in the broker, the rest here; do its workers keep up?",
    "missing": "is missing in the broker: the next hand-over declares it",
    "refused": "is refused by the broker: {each.problem}",
    "unknown": "was not asked about: the broker takes too long to answer",
}
"""What a person reads of a queue's state."""

_CONDITION = re.compile(r"\s*([a-z]+)\s*(>=|<=|>|<|=)\s*(\d+(?:\.\d+)?)([smhd]?)\s*")
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "=": operator.eq}


def as_lines(status: Status) -> Iterator[str]:
    """What a person reads."""
    yield f"PostgreSQL  {'DOWN: ' + plain(status.database_problem) if status.database_problem else 'ok'}"
    yield f"broker      {'DOWN: ' + plain(status.broker_problem) if status.broker_problem else 'ok, ' + status.broker}"
    if status.database_problem:
        return
    ledger = status.ledger
    relays = f"ok, {ledger.relays} connected" if ledger.relays else "NONE is connected: start one with `outbox relay`"
    yield f"relay       {relays}"
    yield ""
    yield _table(status) if ledger.consumers else "Nothing is open."
    if ledger.completed.estimated:
        about = "unknown, never analyzed" if ledger.completed.count is None else f"~{ledger.completed.count:,}"
        yield f"completed: {about} (--exact counts them)"
    yield from _hints(status)


def _table(status: Status) -> str:
    columns = [
        Column("QUEUE, CONSUMER", least=18),
        *(
            Column(name, right=True)
            for name in ("PENDING", "DISPATCHED", "RUNNING", "FAILED", "DEAD", "DONE", "OLDEST")
        ),
    ]
    marks = _marks(status)
    rows: list[list[str]] = []
    for queue, consumers in groupby(sorted(status.ledger.consumers.items()), key=lambda item: item[0][0]):
        rows.append([f"{queue} ({marks[queue]})" if queue in marks else queue, *[""] * 7])
        rows += [[f"  {consumer}", *_cells(counts)] for (_, consumer), counts in consumers]
    return table(columns, rows, gap=1)


def _marks(status: Status) -> dict[str, str]:
    """What is out of the ordinary, by queue."""
    marks = {name: each.state for name, each in status.queues.items() if each.state != "ok"}
    paused = {each.queue for each in status.ledger.paused}
    limited = {each.queue: "limited" for each in status.ledger.limited}
    return limited | marks | {queue: "paused" for queue, _ in status.ledger.consumers if paused & {queue, EVERY_QUEUE}}


def _cells(counts: Counts) -> list[str]:
    numbers = (counts.pending, counts.dispatched, counts.running, counts.failed, counts.dead, counts.completed)
    return [*map(compact, numbers), age(counts.oldest)]


def _hints(status: Status) -> Iterator[str]:
    for pause in status.ledger.paused:
        which = "all queues are" if pause.queue == EVERY_QUEUE else f"queue {pause.queue} is"
        why = f": {pause.why}" if pause.why else ""
        yield plain(f"{which} paused for {age(pause.age)} by {pause.paused_by}{why}")
    for limit in status.ledger.limited:
        why = f": {limit.why}" if limit.why else ""
        yield plain(f"queue {limit.queue} is limited to {said(limit)} by {limit.limited_by}{why}")
    for name, each in status.queues.items():
        if each.state in _STATES:
            yield plain(f"queue {name} {_STATES[each.state].format(each=each)}")
    for (queue, consumer), counts in sorted(status.ledger.consumers.items()):
        if counts.unclaimed:
            waiting = f"{counts.unclaimed:,} handed over repeatedly and not taken"
            yield plain(f"{consumer}: {waiting}; is a worker on {queue}?")
    if status.ledger.stranded:
        yield f"{status.ledger.stranded:,} lanes are stranded: outbox lanes repair"
    if status.ledger.blocked:
        yield f"{status.ledger.blocked:,} lanes stand for a dead letter: outbox lanes list"
    if dead := status.ledger.total("dead"):
        yield f"{dead:,} dead: outbox dead-letters list"


def as_json(status: Status) -> dict[str, Any]:
    """The same for machines; `oldest` in seconds."""
    return {
        "postgresql": {"ok": status.database_problem is None, "problem": status.database_problem},
        "broker": {"ok": status.broker_problem is None, "problem": status.broker_problem, "address": status.broker},
        "relays": status.ledger.relays,
        "totals": {name: _metric(status, name) for name in METRICS},
        "completed": asdict(status.ledger.completed),
        "paused": [asdict(each) for each in status.ledger.paused],
        "limited": [asdict(each) for each in status.ledger.limited],
        "queues": [{"queue": name} | asdict(each) for name, each in status.queues.items()],
        "consumers": [
            {"queue": queue, "consumer": consumer} | asdict(counts)
            for (queue, consumer), counts in sorted(status.ledger.consumers.items())
        ],
    }


def _metric(status: Status, name: str) -> float:
    match name:
        case "oldest":
            return status.ledger.oldest or 0
        case "relays":
            return status.ledger.relays
        case "paused":
            return len(status.ledger.paused)
        case "stranded":
            return status.ledger.stranded
    return status.ledger.total(name)


def check_conditions(text: str) -> list[tuple[str, str, float]]:
    """`dead>0,oldest>300s` as (metric, comparison, number).

    Raises:
        CommandError: naming the condition that makes no sense.
    """
    return [_condition(each) for each in text.split(",")]


def _condition(text: str) -> tuple[str, str, float]:
    match = _CONDITION.fullmatch(text)
    if match is None or match[1] not in METRICS or (match[4] and match[1] != "oldest"):
        raise CommandError(
            f"--fail-if: {text.strip()!r} is no condition; expected 'dead>0' or 'oldest>300s', of {', '.join(METRICS)}"
        )
    number = parse_duration(match[3] + match[4], "--fail-if").total_seconds() if match[4] else float(match[3])
    return match[1], match[2], number


def failing(status: Status, conditions: list[tuple[str, str, float]]) -> list[str]:
    """The conditions that are true, with what was found."""
    return [
        f"{name} is {_metric(status, name):g} (fails if {name}{comparison}{limit:g})"
        for name, comparison, limit in conditions
        if _COMPARE[comparison](_metric(status, name), limit)
    ]
