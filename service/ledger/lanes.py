"""Lanes: deliveries that take effect one at a time, in the order in which their publishers committed.

A delivery in a lane is *parked* until its turn comes: it is `pending` and due in the year 9000. So relay, claim, floor
and high-water mark know nothing of lanes, since `due_at` is still the only clock. Whoever ends a row lets the next one
of its lane come due, in the same transaction.

    enters      `outbox_enter_lane`, at the commit of whatever inserted a row with a `lane`: it takes its `position`,
                and is due at once where the lane is free
    leaves      `outbox_leave_lane`, at the commit of whatever completed or deleted an open row: a worker's completion,
                a death, a cancellation, an expiry. The next one comes due, unless a dead letter blocks the lane
    goes on     `outbox_unblock_lane`, at the commit of whatever resolved a dead letter that blocked

All of it is triggers of the tables (`migrations/ledger/*_lanes.py`): whoever writes there need not know of lanes, not
even an older version of this code. They are deferred to the commit, and see nothing of a savepoint that was undone.

What must stay true:

- At most one row of a lane is open and not parked. Positions are in the order of commits. Where rows are open and no
  dead letter blocks, exactly one is not parked.
- Whoever enters, leaves or goes on holds the lane's lock from before it looks until its transaction has ended, and
  looks in a statement that began after it had the lock: one that began before sees the lane as it was. The position is
  taken under the lock, too. `tests/proof/lanes/model.py` finds what goes wrong without each of these.
- A transaction takes all its locks at once and sorted.
- The newest row that has a position is open while any row of the lane is: that alone tells whether a lane is free.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

_PARKED = datetime(9000, 1, 1, tzinfo=UTC)
"""As `outbox_parked()` of the database has it."""


def parked(lane: str) -> dict[str, Any]:
    """The columns of a new row that waits for its turn in a lane."""
    return {"lane": lane, "due_at": _PARKED}
