"""What one relay has done since it started. Counted once a batch, and read only by whoever serves metrics."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from service.ledger.statistics import Histogram

if TYPE_CHECKING:
    from service.ledger.dispatching import Batch


class Tally:
    """Deliveries and refused batches by queue, rows that were purged by table."""

    def __init__(self) -> None:
        self.handed_over: Counter[str] = Counter()
        self.redispatched: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.workers_lost: Counter[str] = Counter()
        self.purged: Counter[str] = Counter()
        self.batches: dict[str, Histogram] = defaultdict(Histogram)

    def add(self, queue: str, batch: Batch, seconds: float) -> None:
        """A batch is committed."""
        self.handed_over[queue] += len(batch.deliveries)
        self.redispatched[queue] += batch.unclaimed
        self.workers_lost[queue] += batch.lost
        self.batches[queue].add(seconds)
