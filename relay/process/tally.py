"""What one relay has done since it started. Counted once a batch, and read only by whoever serves metrics."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from service.ledger.statistics import Histogram

if TYPE_CHECKING:
    from service.ledger.dispatching import Batch


class Tally:
    """Deliveries and refused batches by queue, rows that were purged by table.

    What has not happened yet is there as 0: an increase shows only from a number that was there before.
    """

    def __init__(self) -> None:
        self.handed_over: Counter[str] = Counter()
        self.redispatched: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.workers_lost: Counter[str] = Counter()
        self.purged = Counter(outbox_message=0, idempotency_key=0, outbox_minute=0)
        self.purge_failures = 0
        self.batches: dict[str, Histogram] = defaultdict(Histogram)

    def add(self, queue: str, batch: Batch, seconds: float) -> None:
        """A batch is committed."""
        self.handed_over[queue] += len(batch.deliveries)
        self.redispatched[queue] += batch.unclaimed
        self.workers_lost[queue] += batch.lost
        self.refused[queue] += 0
        self.batches[queue].add(seconds)
