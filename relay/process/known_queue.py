"""What a relay remembers of one queue between two hand-overs.

A queue that was refused rests, each time for longer up to a bound, and is then tried apart from the others: it may hang
for as long as the sender waits, and would hold all of them up.

A limited queue that may not be handed anything rests too, for a part of the time that it has gone without: when it may
again depends on its workers, who tell nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from service.backoff import backoff
from service.ledger.dispatching import NO_FLOOR

if TYPE_CHECKING:
    from service.ledger.dispatching import Floor
    from service.ledger.sharing import Shares

_SHORTEST_REST = 250
_LONGEST_REST = 5_000
"""Milliseconds."""

_PART = 0.25
_SHORTEST_HOLD = 0.005
_LONGEST_HOLD = 0.05
"""Of the time since the last hand-over, and seconds: so long a free slot may go unnoticed."""

_LONGEST_WAIT = 1.0
"""Seconds, where it is known when the queue may be handed something: its limit may be changed meanwhile."""


class KnownQueue:
    """One queue, as this relay knows it. Times are those of the event loop, in seconds.

    Attributes:
        floor: Where the next scan may start.
        depth: Messages that waited in the broker's queue when it last said so.
        refused: How often in a row the queue took nothing.
        served_at: When it last had its turn.
        limited: Whether it had a limit at the last look.
        shares: Whose turn it is, if keys took turns in it at the last look.
    """

    def __init__(self) -> None:
        self.floor: Floor = NO_FLOOR
        self.depth = 0
        self.refused = 0
        self.served_at = 0.0
        self.limited = False
        self.shares: Shares | None = None
        self._rests_until = 0.0
        self._held_until = 0.0
        self._handed_over_at = 0.0

    def refuse(self, now: float) -> float:
        """Note that it took nothing; for how many seconds it is left alone now."""
        self.refused += 1
        return self.rest(now)

    def rest(self, now: float) -> float:
        """Leave it alone as long as after the last refusal; for how many seconds."""
        pause = backoff(max(self.refused, 1), _SHORTEST_REST, _LONGEST_REST).total_seconds()
        self._rests_until = now + pause
        return pause

    def rests_for(self, now: float) -> float:
        """Seconds until it may be tried again, 0 or less if it may be now."""
        return self._rests_until - now

    def hold(self, now: float, wait: float | None, *, handed_over: bool) -> None:
        """Note what became of a turn of a limited queue; see `limited_dispatching.Turn`."""
        self._handed_over_at = now if handed_over else self._handed_over_at
        if wait is None:
            wait = min(max(_PART * (now - self._handed_over_at), _SHORTEST_HOLD), _LONGEST_HOLD)
        self._held_until = now + min(wait, _LONGEST_WAIT)

    def held_for(self, now: float) -> float:
        """Seconds until its limit may let something through, 0 or less if it may now."""
        return self._held_until - now if self.limited else 0.0
