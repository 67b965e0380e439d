"""Whether more ran at once, or started in a span, than a queue's limit allows: by what the sink was told.

A run is seen from when its consumer began until its effect arrived, which is less than it lasted. What a fault hit may
have stood still for longer than its lease, and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.proof.chaos.checker import Fault
    from tests.proof.chaos.sink import Copy

__all__ = ["Limited", "exceeded"]

_UNDER_LEASE = 1.5
"""Seconds after its beginning for which a run surely holds its lease, with `SHORT` and much else to do."""

_LATE = 1.0
"""Seconds from a claim until the consumer begins, on a machine with much to do."""


@dataclass(frozen=True)
class Limited:
    """What was set: how many at once, and how many in a second, `burst` of them at a time."""

    queue: str
    concurrency: int | None = None
    rate: float | None = None
    burst: int = 1

    @property
    def options(self) -> list[str]:
        """For `outbox queues limit`."""
        options = [] if self.concurrency is None else ["--concurrency", str(self.concurrency)]
        rate = [] if self.rate is None else ["--rate", f"{self.rate:g}/s", "--burst", str(self.burst)]
        return [self.queue, *options, *rate]


def exceeded(limit: Limited, copies: Sequence[Copy], faults: Sequence[Fault]) -> list[str]:
    """Where it was; `copies` are those of the limited queue since the limit was set."""
    runs = [each for each in copies if not any(_hit(fault, each) for fault in faults)]
    return [*_at_once(limit, runs), *_starts(limit, runs)]


def _hit(fault: Fault, copy: Copy) -> bool:
    return (fault.pids is None or copy.pid in fault.pids) and fault.began <= copy.at and copy.began <= fault.ended


def _at_once(limit: Limited, runs: Sequence[Copy]) -> list[str]:
    if limit.concurrency is None:
        return []
    spans = [(each.began, min(each.at, each.began + _UNDER_LEASE)) for each in runs]
    most = max((sum(began <= now < ended for began, ended in spans) for now, _ in spans), default=0)
    return [f"over the limit: {most} at once"] if most > limit.concurrency else []


def _starts(limit: Limited, runs: Sequence[Copy]) -> list[str]:
    if limit.rate is None:
        return []
    starts = sorted(each.began for each in runs)
    for first, began in enumerate(starts):
        for last in range(first, len(starts)):
            allowed = limit.burst + limit.rate * (starts[last] - began + _LATE)
            if last - first + 1 > allowed:
                return [f"over the limit: {last - first + 1} started in {starts[last] - began:.2f} s"]
    return []
