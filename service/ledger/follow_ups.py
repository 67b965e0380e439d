"""Follow-ups: events that are published once all consumers of another one are done.

A follow-up is there from the start, as one delivery to `FAN_OUT`, the consumer that publishes it. That delivery is
parked, as what waits in a lane is: pending, and due in the year 9000. Those that it waits for name it in a header, and
it names their event in another. Headers go wherever a delivery goes, to its dead letter and back, and cost one that has
none nothing.

    comes due   `outbox_follow_up`, at the commit of whatever completed or deleted a delivery that names a follow-up, or
                discarded its dead letter: if the event has no open delivery and no open dead letter any more
    is gone     `cancelling.cancel_open`, with any delivery of the event that is cancelled

So a consumer is done when its delivery is completed or has expired, or when a person has discarded its dead letter.
All of it is triggers of the tables (`migrations/ledger/*_follow_ups.py`): whoever writes there need not know of
follow-ups, not even an older version of this code.

What must stay true:

- Whoever ends a delivery locks the parked one before it looks whether others are open, and looks in a statement that
  began after it had the lock. Of two that are the last, the second then sees the first; else neither would see the
  other, and the follow-up would wait for ever.
- It is locked after everything else: the deliveries that it waits for, and the locks of lanes. Who ends deliveries of
  several events in one transaction locks all that waits for them at once, sorted, by `outbox_lock_follow_ups`.
- It comes due by being written anew, under its id. So it is published, and its latency counts, from then on, and who
  waited for the lock finds nothing to do.
"""

from __future__ import annotations

THEN = "then"
"""The header of a delivery for which an event waits: that event's id."""

AFTER = "after"
"""The header of the delivery that waits: the id of the event whose consumers have to be done first."""
