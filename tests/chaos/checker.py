"""The checker: compares what was accepted, what the business tables say and what the outside world received.

It trusts none of the three, and not the ledger under test either. What must stay true:

- Every accepted request has each of its effects at least once, or, if it is poison, a dead letter. What is missing by
  the time the checker is asked is `lost`.
- An effect in the database happens once, whatever dies. A second one is `duplicated`, and so is anything that nobody
  asked for.
- An effect outside may be repeated only if a fault hit the worker that made one of the copies, at a time that explains
  it. Any other copy is `duplicated`, too.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.chaos.domain import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.chaos.sink import Copy

__all__ = ["Fault", "Request", "Tables", "Verdict", "judge"]

LONGEST_RUN = 8.0
"""Seconds from a claim to the last thing that a run of it can do: its time limit, its grace and a little."""


@dataclass(slots=True)
class Request:
    """One request, as its sender knows it. `accepted` is when a success was read."""

    key: str
    subject: str
    how: str
    sent: float
    accepted: float | None = None
    unanswered: int = 0
    poison: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A crash or freeze of workers, or of what they need to complete a run. `pids` is `None` for all workers.

    One that `rewinds` put the database back to an earlier state: what it forgot happens again, as another event.
    """

    what: str
    began: float
    ended: float
    pids: frozenset[int] | None = None
    rewinds: bool = False


@dataclass(slots=True)
class Tables:
    """What the database says about the subjects."""

    things: Counter[str] = field(default_factory=Counter)
    bookings: Counter[str] = field(default_factory=Counter)
    shard_total: int = 0
    dead: set[str] = field(default_factory=set)
    open_rows: int = 0
    dispatches: int = 0


@dataclass(slots=True)
class Verdict:
    """`lost` and `duplicated` name each case; both are empty for a system that keeps its promises."""

    accepted: int = 0
    effects: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    excused: int = 0
    dead: int = 0
    wrongly_dead: list[str] = field(default_factory=list)
    unfinished: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong and nothing is left to do."""
        return self.complete and not (self.duplicated or self.wrongly_dead)

    @property
    def complete(self) -> bool:
        """Whether everything has happened."""
        return not (self.lost or self.unfinished)


def judge(
    requests: Iterable[Request], tables: Tables, received: Sequence[Copy], faults: Sequence[Fault] = ()
) -> Verdict:
    """Compare the records."""
    asked = {request.subject: request for request in requests}
    accepted = {subject: request for subject, request in asked.items() if request.accepted is not None}
    outside = Counter((copy.subject, copy.consumer) for copy in received)
    verdict = Verdict(accepted=len(accepted), unfinished=tables.open_rows, dead=len(tables.dead))
    verdict.effects = sum(tables.bookings.values()) + len(received)
    for subject, request in accepted.items():
        verdict.lost += _missing(request, tables, outside)
        if subject in tables.dead and not request.poison:
            verdict.wrongly_dead.append(f"{subject} ({request.how or 'ordinary'})")
    verdict.duplicated += _repeated(asked, tables, outside)
    excused, blamed = _copies(received, faults)
    verdict.excused = excused
    verdict.duplicated += blamed
    return verdict


def _missing(request: Request, tables: Tables, outside: Counter[tuple[str, str]]) -> list[str]:
    subject = request.subject
    missing = [] if tables.things[subject] else [f"{subject}: no thing"]
    if request.poison:
        return missing if subject in tables.dead else [*missing, f"{subject}: no dead letter ({request.how})"]
    if not tables.bookings[subject]:
        missing.append(f"{subject}: no booking")
    missing += [f"{subject}: {consumer} never sent" for consumer in OUTSIDE if not outside[subject, consumer]]
    return missing


def _repeated(asked: dict[str, Request], tables: Tables, outside: Counter[tuple[str, str]]) -> list[str]:
    """Effects in the database that happened more than once, or for nobody."""
    wrong = [f"{subject}: {count} things" for subject, count in tables.things.items() if count > 1]
    wrong += [f"{subject}: {count} bookings" for subject, count in tables.bookings.items() if count > 1]
    wrong += [f"{subject}: a booking of nothing" for subject in tables.bookings if not tables.things[subject]]
    wrong += [f"{subject}: nobody asked for it" for subject in tables.things if subject not in asked]
    wrong += [f"{subject}: sent for nothing" for subject, _ in outside if subject not in asked]
    wrong += [
        f"{subject}: poison took effect"
        for subject, request in asked.items()
        if request.poison and tables.bookings[subject]
    ]
    bookings = sum(tables.bookings.values())
    if tables.shard_total != bookings:
        wrong.append(f"the shards count {tables.shard_total} of {bookings} bookings")
    return wrong


def _copies(received: Sequence[Copy], faults: Sequence[Fault]) -> tuple[int, list[str]]:
    """How many repeated effects outside are explained by a fault, and those that are not."""
    by_effect: dict[tuple[str, str], list[Copy]] = defaultdict(list)
    for copy in received:
        by_effect[copy.subject, copy.consumer].append(copy)
    excused, blamed = 0, []
    for (subject, consumer), copies in by_effect.items():
        if len({copy.key for copy in copies}) > 1 and not any(fault.rewinds for fault in faults):
            blamed.append(f"{subject}: {consumer} sent under {len(copies)} keys")
        for first, second in itertools.pairwise(copies):
            if any(_explains(fault, first, second) for fault in faults):
                excused += 1
            else:
                attempts = f"attempts {first.attempt} and {second.attempt}, {second.at - first.at:.2f} s apart"
                blamed.append(f"{subject}: {consumer} sent again without a reason ({attempts})")
    return excused, blamed


def _explains(fault: Fault, first: Copy, second: Copy) -> bool:
    if fault.pids is not None and not fault.pids & {first.pid, second.pid}:
        return False
    return fault.began <= second.at and fault.ended >= first.at - LONGEST_RUN
