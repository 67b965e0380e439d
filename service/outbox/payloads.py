"""What is stored of an event: JSON from which its consumers read an equal event.

What must stay true: what cannot be read, reads as something else, or PostgreSQL cannot store, is refused here, where
the request still fails with it; in a row it would be found out by a consumer, after the request succeeded. So each
event is read back before it is stored; that costs less than to tell the classes that need it from those that do not.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from service.errors import PublishError

if TYPE_CHECKING:
    from service.outbox.events import Event

MAX_PAYLOAD_BYTES = 8_192
"""Size of an event's JSON at most: it holds IDs and small scalars."""

_to_json = json.JSONEncoder(allow_nan=False).encode  # made once: `json.dumps` would make it anew for each event


def payload_of(event: Event) -> dict[str, Any]:
    """The event's fields as JSON has them.

    Raises:
        PublishError: when they are too large, or when a consumer would not be handed an equal event.
    """
    name = type(event).__name__
    for field, value in event.__dict__.items():
        if value is None and (field == "id" or field.endswith("_id")):
            raise PublishError(
                f"{name}.{field} is None: make ids when the object is constructed (id=new_id()), so that they exist "
                "before the row is flushed"
            )
    try:
        payload: dict[str, Any] = event.model_dump(mode="json", warnings=False)
        document = _to_json(payload)
    except ValueError as error:  # NaN and infinities, or a number with thousands of digits
        raise PublishError(f"{name} has no form in JSON ({str(error)[:100]}): publish what can be stored") from None
    if len(document) > MAX_PAYLOAD_BYTES:
        raise PublishError(
            f"{name} is {len(document)} bytes of JSON, over {MAX_PAYLOAD_BYTES}: store the data in a row and publish "
            "its ID"
        )
    try:
        stored = type(event).model_validate_json(document)
    except ValidationError as error:
        raise PublishError(f"a consumer could not read this {name} from JSON: {summary(error)}") from None
    if stored.__dict__ != event.__dict__:
        _refuse_difference(event, stored)
    if "\\u0000" in document and any(isinstance(value, str) and "\x00" in value for value in payload.values()):
        raise PublishError(f"{name} holds a NUL character, which PostgreSQL cannot store: remove it")
    return payload


def summary(error: ValidationError) -> str:
    """Which fields are wrong and how, without their values."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(": ".join((*map(str, each["loc"]), each["msg"])) for each in problems)[:300]


def _refuse_difference(event: Event, stored: Event) -> None:
    for field in type(event).model_fields:
        one, other = getattr(event, field), getattr(stored, field)
        if one != other and not _same_moment(one, other):
            raise PublishError(
                f"{type(event).__name__}.{field} would come back as {type(other).__name__} with another value than the "
                f"{type(one).__name__} published: use a type that JSON keeps"
            )


def _same_moment(one: object, other: object) -> bool:
    """When the clocks are put back, a time of that zone equals none that has an offset instead, whatever the moment."""
    if not (isinstance(one, datetime) and isinstance(other, datetime) and one.tzinfo and other.tzinfo):
        return False
    return one.astimezone(UTC) == other.astimezone(UTC)
