"""The order that a consumer asks for, which of its deliveries are in one lane; and the key under which they take turns.

What must stay true: a lane's name is stored in every row that waits in it, so it must survive a rename of the consumer.
How a lane works is in `service/ledger/lanes.py`, and how keys take turns in `service/ledger/sharing.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from service.errors import ConsumerDefinitionError, PublishError
from service.ledger.delivering import SHARE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.outbox.events import Event

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_LONGEST_KEY = 255


@dataclass(frozen=True, slots=True)
class InOrder:
    """Deliveries whose events have the same value in `field` take effect one at a time, in the order of commits.

    Attributes:
        field: Of the event.
        lane: Shared by all consumers whose deliveries stand in one order.
        skips: Whether a lane goes on without what was given up.
    """

    field: str
    lane: str
    skips: bool

    def lane_of(self, payload: Mapping[str, Any]) -> str:
        """The lane of an event with this payload.

        Raises:
            PublishError: when the field holds nothing that could name one.
        """
        return f"{self.lane}:{key_in(payload, self.field, f'orders the deliveries of {self.lane}')}"


def key_in(payload: Mapping[str, Any], field: str, why: str) -> str:
    """What a field holds, as a key.

    Raises:
        PublishError: it is none; `why` says what it is needed for.
    """
    key = payload[field]
    if key is None or isinstance(key, list | dict) or not 0 < len(str(key)) <= _LONGEST_KEY:
        raise PublishError(f"{field} {why}, so it must be a scalar of 1 to {_LONGEST_KEY} characters")
    return str(key)


def in_order(
    consumer: str, event: type[Event], *, order_by: str | None, lane: str | None, skip_dead: bool, renamed: bool
) -> InOrder | None:
    """What a consumer's options ask for.

    Raises:
        ConsumerDefinitionError: when they make no sense together.
    """
    if order_by is None:
        if lane is not None or skip_dead:
            raise ConsumerDefinitionError(f"{consumer}: lane= and skip_dead= need order_by=, the field that orders")
        return None
    if order_by not in event.model_fields:
        raise ConsumerDefinitionError(f"{consumer}: order_by={order_by!r} is no field of {event.__name__}")
    if lane is None and renamed:
        raise ConsumerDefinitionError(
            f"{consumer}: give lane= the name it had before, or what was published under that name would be in another "
            "lane"
        )
    if lane is not None and not _NAME.fullmatch(lane):
        raise ConsumerDefinitionError(f"{lane!r} is no lane: letters, digits, _, - and dots, at most 128")
    return InOrder(order_by, lane or consumer, skip_dead)


def shared_by(consumer: str, event: type[Event], field: str | None) -> str | None:
    """The field by which its deliveries take turns.

    Raises:
        ConsumerDefinitionError: when the event has no such field.
    """
    if field is not None and field not in event.model_fields:
        raise ConsumerDefinitionError(f"{consumer}: share_by={field!r} is no field of {event.__name__}")
    return field


def share_of(payload: Mapping[str, Any], field: str | None) -> dict[str, str]:
    """The header with the key under which an event with this payload takes turns; none without a field.

    Raises:
        PublishError: when the field holds nothing that could be one.
    """
    return {} if field is None else {SHARE: key_in(payload, field, "says whose turn it is")}
