"""What the pages show again and again, asked of the ledger once for all who look."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from service.console.looks import Shared, SharedByKey
from service.ledger import lanes, letter_groups, statistics
from service.ledger.counting import LedgerCounts, count
from service.ledger.statistics import FORGET_PROCESSES_AFTER, Histogram, SeenProcess

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from service.console.looks import ConsolePool
    from service.ledger.dead_letters import LetterFilter
    from service.ledger.lanes import StandingLane
    from service.ledger.letter_groups import LetterGroup
    from service.ledger.statistics import Key, Runs

MINUTES = 60
"""Minutes that a graph shows."""

LANES = 100
"""Lanes that are shown of those that stand."""

_RATE_OVER = 5
_QUANTILE_OVER = 15
_FAILED = ("failed", "dead", "lost")


@dataclass(slots=True)
class Pace:
    """How a consumer went in the last hour.

    Attributes:
        completed: Runs in each of its minutes, the last of which is not over.
        failed: Those that failed, died or were lost.
        rate: Completed in a minute, in the last five that are over.
        p99: Seconds from commit to effect that 99 of 100 did not exceed in 15 minutes.
    """

    completed: list[int] = field(default_factory=lambda: [0] * MINUTES)
    failed: list[int] = field(default_factory=lambda: [0] * MINUTES)
    effect: Histogram = field(default_factory=Histogram)

    @property
    def rate(self) -> float:
        return sum(self.completed[-_RATE_OVER - 1 : -1]) / _RATE_OVER

    @property
    def p99(self) -> float | None:
        return self.effect.quantile(0.99)


Paces = dict[tuple[str, str], Pace]


class LedgerLooks:
    """Answers that all who look share."""

    def __init__(self, pool: ConsolePool) -> None:
        self._pool = pool
        self.counts = Shared(self._count, kept=2)
        self.paces = Shared(self._pace, kept=10)
        self.lanes = Shared(self._lanes, kept=5)
        self.processes = Shared(self._processes, kept=5)
        self.groups = SharedByKey(self._groups, kept=5)

    async def _count(self) -> LedgerCounts:
        async with self._pool() as connection:
            return await count(connection)

    async def _pace(self) -> Paces:
        async with self._pool() as connection:
            now: datetime = await connection.fetchval("SELECT date_trunc('minute', clock_timestamp())")
            return paces(now, await statistics.minutes(connection, timedelta(minutes=MINUTES - 1)))

    async def _lanes(self) -> tuple[int, list[StandingLane]]:
        async with self._pool() as connection:
            return await lanes.standing(connection, LANES)

    async def _processes(self) -> list[SeenProcess]:
        async with self._pool() as connection:
            return await statistics.processes(connection, FORGET_PROCESSES_AFTER)

    async def _groups(self, wanted: LetterFilter) -> list[LetterGroup]:
        async with self._pool() as connection:
            return await letter_groups.groups(connection, wanted)


def paces(now: datetime, counted: Sequence[tuple[datetime, Key, Runs]]) -> Paces:
    """By queue and consumer, for the hour that ends with the minute `now`."""
    found: defaultdict[tuple[str, str], Pace] = defaultdict(Pace)
    for minute, key, runs in counted:
        ago = round((now - minute) / timedelta(minutes=1))
        if not 0 <= ago < MINUTES:
            continue
        pace = found[key.queue, key.consumer]
        if key.outcome == "completed":
            pace.completed[-1 - ago] += runs.count
            if ago <= _QUANTILE_OVER:
                pace.effect.merge(runs.effect)
        elif key.outcome in _FAILED:
            pace.failed[-1 - ago] += runs.count
    return dict(found)
