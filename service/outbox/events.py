"""What an event is: a typed, frozen fact with a stable name, holding IDs and small scalars.

Events live in the ledger for days and cross deployments, so they are stored under a name that no refactoring changes
(`order.placed`), never under a class path, and they carry no business data: a consumer reads what it needs, as it is
by then, from the rows the IDs point to.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from service.errors import EventDefinitionError
from service.outbox.event_fields import check_fields

_TYPE_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+")
_EVENTS: dict[str, type[Event]] = {}


class Event(BaseModel):
    """Base of every event.

        class OrderPlaced(Event, type="order.placed", version=1):
            order_id: UUID

    Args:
        type: Stable dotted name in the past tense; the class may be renamed, this may not.
        version: Raise it when a consumer of the old version must not read the new one. A new field with a default
            needs no new version: older consumers ignore it.
        unconsumed: Declare that nobody consumes this event yet; otherwise publishing it is an error.

    Raises:
        EventDefinitionError: for a name that is taken or malformed, or a field that is no ID or small scalar or would
            not come back from JSON as it went in.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_timedelta="iso8601")

    event_type: ClassVar[str]
    event_version: ClassVar[int]
    unconsumed: ClassVar[bool]

    def __init_subclass__(cls, **_arguments: Any) -> None:
        # The arguments of the class statement are for the method below; `object` takes none.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        type: str | None = None,  # noqa: A002
        version: int = 1,
        unconsumed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if type is None or not _TYPE_NAME.fullmatch(type) or len(type) > 128:
            raise EventDefinitionError(
                f"{cls.__name__} needs a dotted name in the past tense, such as type='order.placed'"
            )
        if not 1 <= version <= 32_767:
            raise EventDefinitionError(f"{cls.__name__}: version must be a whole number from 1")
        taken = _EVENTS.get(type)
        if taken is not None and (taken.event_version, *_definition(taken)) != (version, *_definition(cls)):
            raise EventDefinitionError(f"{type!r} is already the type of {taken.__module__}.{taken.__qualname__}")
        check_fields(cls)
        cls.event_type, cls.event_version, cls.unconsumed = type, version, unconsumed
        _EVENTS[type] = cls


class AnyEvent(Event, type="outbox.any"):
    """Stands for every event where a consumer of the template's own takes whatever comes."""


def event_named(event_type: str) -> type[Event] | None:
    """The class of events that are stored under this type, if this process knows one."""
    return _EVENTS.get(event_type)


def _definition(cls: type[Event]) -> tuple[object, ...]:
    """What stays the same when its module is imported again, and differs in a namesake."""
    fields = {name: repr(field.annotation) for name, field in cls.model_fields.items()}
    return cls.__module__, cls.__qualname__, fields
