"""The checker: compares what was accepted, what the business tables say and what the outside world received.

It trusts none of the three, and not the ledger under test either. What must stay true:

- Every accepted request has each of its effects at least once, or, if it is poison, a dead letter. What is missing by
  the time the checker is asked is `lost`.
- An effect in the database happens once, whatever dies. A second one is `duplicated`, and so is anything that nobody
  asked for.
- An effect outside may be repeated only if a fault hit the run that made the copy before, between its beginning and its
  completion, or if the run that made this one stood still while another worker ran the row. Each fault explains one
  copy more of an effect, or one for each two seconds that it lasted. Any other copy is `duplicated`, too.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.proof.chaos.domain import OUTSIDE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.proof.chaos.sink import Copy

__all__ = ["Fault", "Request", "Tables", "Verdict", "judge"]

LONGEST_FINISH = 1.0
"""Seconds from an effect outside to its completion, on a machine with much to do."""

_SHORTEST_STANDSTILL = 1.0
"""Seconds in which a lease may end that nobody extends; a heartbeat may have been due just then."""


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

    It explains at most `copies` further copies of one effect. One that `rewinds` put the database back to an earlier
    state: what it forgot happens again, as another event.
    """

    what: str
    began: float
    ended: float
    pids: frozenset[int] | None = None
    rewinds: bool = False

    @property
    def copies(self) -> int:
        """One for each two seconds or part of them."""
        return 1 + int((self.ended - self.began) / 2)


@dataclass(slots=True)
class Tables:
    """What the database says about the subjects."""

    things: Counter[str] = field(default_factory=Counter)
    bookings: Counter[str] = field(default_factory=Counter)
    shard_total: int = 0
    dead: set[str] = field(default_factory=set)
    open_rows: int = 0
    states: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of each row still in the outbox, by subject and consumer."""
    attempts: int = 0
    redispatched: int = 0
    turns: list[tuple[int, int, int]] = field(default_factory=list)
    """Key, number, and the greatest number that was seen, in the order in which they were taken."""
    numbers: dict[int, int] = field(default_factory=dict)
    """How many numbers each key has given out."""
    stranded: list[str] = field(default_factory=list)
    """Lanes in which something waits, and nothing is under way or blocks."""


@dataclass(slots=True)
class Verdict:
    """`lost`, `duplicated` and `disordered` name each case; they are empty for a system that keeps its promises."""

    accepted: int = 0
    effects: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    excused: int = 0
    dead: int = 0
    wrongly_dead: list[str] = field(default_factory=list)
    exceeded: list[str] = field(default_factory=list)
    """Where more ran or started than a limit allows."""
    unfinished: int = 0
    attempts: int = 0

    @property
    def accusations(self) -> list[str]:
        """Everything that is lost, happened twice, was out of order or over a limit."""
        return [*self.lost, *self.duplicated, *self.disordered, *self.exceeded]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong and nothing is left to do."""
        return self.complete and not (self.duplicated or self.disordered or self.wrongly_dead or self.exceeded)

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
    verdict = Verdict(
        accepted=len(accepted), unfinished=tables.open_rows, dead=len(tables.dead), attempts=tables.attempts
    )
    verdict.effects = sum(tables.bookings.values()) + len(received)
    for subject, request in accepted.items():
        verdict.lost += _missing(request, tables, outside)
        if subject in tables.dead and not request.poison:
            verdict.wrongly_dead.append(f"{subject} ({request.how or 'ordinary'})")
    verdict.duplicated += _repeated(asked, tables, outside)
    verdict.disordered += _disordered(tables)
    excused, blamed = _copies(received, faults)
    verdict.excused = excused
    verdict.duplicated += blamed
    return verdict


def _missing(request: Request, tables: Tables, outside: Counter[tuple[str, str]]) -> list[str]:
    subject = request.subject
    missing = [] if tables.things[subject] else [f"{subject}: no thing"]
    if request.poison:
        return missing if subject in tables.dead else [*missing, f"{subject}: no dead letter ({request.how})"]

    def row(consumer: str) -> str:
        return tables.states.get((subject, consumer), "no row")

    if not tables.bookings[subject]:
        missing.append(f"{subject}: no booking ({row('chaos.book')})")
    return missing + [
        f"{subject}: {consumer} never sent ({row(consumer)})" for consumer in OUTSIDE if not outside[subject, consumer]
    ]


def _disordered(tables: Tables) -> list[str]:
    """Each key's numbers must have been taken one after the other, each when the one before was committed."""
    wrong = [f"{lane}: stranded" for lane in tables.stranded]
    last = dict.fromkeys(tables.numbers, 0)
    for key, number, saw in tables.turns:
        if number != last[key] + 1:
            wrong.append(f"key {key}: out of order, {number} after {last[key]}")
        elif saw != last[key]:
            wrong.append(f"key {key}: {number} at the same time as {last[key]}")
        last[key] = number
    if not tables.open_rows:
        wrong += [
            f"key {key}: {last[key]} turns of {count}" for key, count in tables.numbers.items() if last[key] != count
        ]
    return wrong


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
        spent: Counter[Fault] = Counter()
        for first, second in itertools.pairwise(copies):
            fault = next(
                (each for each in faults if spent[each] < each.copies and _explains(each, first, second)), None
            )
            if fault is not None:
                spent[fault] += 1
                excused += 1
            else:
                attempts = f"attempts {first.attempt} and {second.attempt}, {second.at - first.at:.2f} s apart"
                blamed.append(f"{subject}: {consumer} sent again without a reason ({attempts})")
    return excused, blamed


def _explains(fault: Fault, first: Copy, second: Copy) -> bool:
    if fault.rewinds:
        return fault.began <= second.at and fault.ended >= first.at - LONGEST_FINISH
    kept_from_completing = _hits(fault, first) and first.began <= fault.ended
    kept_from_completing &= fault.began <= first.at + LONGEST_FINISH
    # What it does may begin after the standstill that began between its claim and that.
    stood_still = _hits(fault, second) and second.began <= fault.ended + LONGEST_FINISH and first.at >= fault.began
    stood_still &= min(fault.ended, second.at) - fault.began >= _SHORTEST_STANDSTILL
    return kept_from_completing or stood_still


def _hits(fault: Fault, copy: Copy) -> bool:
    return fault.pids is None or copy.pid in fault.pids
