"""The transactional outbox, as a domain sees it.

`publish` writes an event in the caller's transaction; `@consumer` registers what is done about it; `Delivery` is how
a consumer opens the session whose commit also completes the delivery. `@scheduled` and `schedule` publish again and
again.
"""

import service.outbox.fan_out  # noqa: F401  registers its consumer
from service.ledger.ids import new_id
from service.outbox.consumers import Fail, Retry, consumer
from service.outbox.deliveries import Deliveries
from service.outbox.delivery import Delivery
from service.outbox.events import Event
from service.outbox.publish import accept, cancel, publish, publish_all
from service.outbox.schedules.definitions import schedule, scheduled, unschedule
from service.outbox.upcasting import upcaster

__all__ = [
    "Deliveries",
    "Delivery",
    "Event",
    "Fail",
    "Retry",
    "accept",
    "cancel",
    "consumer",
    "new_id",
    "publish",
    "publish_all",
    "schedule",
    "scheduled",
    "unschedule",
    "upcaster",
]
