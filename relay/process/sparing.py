"""Leaving `running` rows alone for as long as healthy leases may look expired.

While PostgreSQL is away no worker can extend a lease. What must stay true: after an outage that may have outlived a
lease, workers get half a lease to extend theirs before the relay takes a row from one; and a connection that breaks
again and again does not put that off for ever.
"""

from __future__ import annotations

_HARMLESS = 0.25
"""The part of a lease that an outage may last: a heartbeat comes when a third of the lease is over, and the workers
need time to connect again."""


class Sparing:
    """Whether to spare `running` rows now. Times are those of the event loop, in seconds.

    Args:
        lease: Seconds that a claim lasts without a heartbeat.
    """

    def __init__(self, lease: float) -> None:
        self._lease = lease
        # A relay that has just started cannot know how long PostgreSQL was away.
        self._heard_at = float("-inf")
        self._until = float("-inf")

    def heard(self, now: float) -> None:
        """PostgreSQL has answered."""
        self._heard_at = now

    def connected(self, now: float) -> None:
        """PostgreSQL has answered on a new connection."""
        if now - self._heard_at > self._lease * _HARMLESS:
            self._until = now + self._lease / 2
        self._heard_at = now

    def active(self, now: float) -> bool:
        """Whether an expired lease may be a healthy one."""
        return now < self._until
