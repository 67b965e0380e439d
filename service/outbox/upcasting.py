"""Events of earlier versions, read as if they had been published today.

Rows outlive the code that wrote them: a delayed event, a retry, a dead letter that is replayed after a year. An
upcaster makes the fields of one version from those of the version before, so that consumers know the latest alone.

What must stay true: a chain has no gap, so whatever was stored can be read. That is found out when the domains are
imported, and not by a row.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from service.errors import EventDefinitionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from service.outbox.events import Event

Fields = dict[str, Any]

E = TypeVar("E", bound="Event")

_BY_EVENT: dict[str, dict[int, Callable[[Fields], Fields]]] = {}
_EVENTS: dict[str, type[Event]] = {}


def upcaster(
    event: type[Event], *, from_version: int
) -> Callable[[Callable[[Fields], Fields]], Callable[[Fields], Fields]]:
    """Register a function that makes the fields of the next version from those of `from_version`.

        @upcaster(OrderPlaced, from_version=1)
        def add_currency(fields: dict[str, Any]) -> dict[str, Any]:
            return fields | {"currency": "EUR"}

    It is handed what is stored, where IDs and times are text. Once there is one for an event, there must be one for
    each version before its latest.

    Raises:
        EventDefinitionError: for a version that is not before the event's, or that has one already.
    """
    if not 1 <= from_version < event.event_version:
        raise EventDefinitionError(
            f"{event.__name__} has version {event.event_version}, so from_version must be from 1 to "
            f"{event.event_version - 1}, not {from_version}"
        )

    def register(fn: Callable[[Fields], Fields]) -> Callable[[Fields], Fields]:
        known = _BY_EVENT.setdefault(event.event_type, {})
        taken = known.get(from_version)
        if taken is not None and (taken.__module__, taken.__qualname__) != (fn.__module__, fn.__qualname__):
            raise EventDefinitionError(
                f"{event.__name__} has an upcaster from version {from_version} already: "
                f"{taken.__module__}.{taken.__qualname__}"
            )
        known[from_version] = fn
        _EVENTS[event.event_type] = event
        return fn

    return register


def check_upcasters() -> None:
    """Look for gaps, once all events are imported.

    Raises:
        EventDefinitionError: naming the version from which no upcaster leads on.
    """
    for event_type, known in _BY_EVENT.items():
        event = _EVENTS[event_type]
        for version in range(1, event.event_version):
            if version not in known:
                raise EventDefinitionError(
                    f"{event.__name__} has upcasters, but none from version {version}: add one, if only to return "
                    "the fields as they are"
                )


def lift(event: type[Event], version: int, fields: Fields) -> Fields:
    """The fields that are stored in a version that the class knows, as its latest has them; `fields` may change.

    Raises:
        Exception: whatever an upcaster raises.
    """
    for each in range(version, event.event_version) if event.event_type in _BY_EVENT else ():
        fields = _BY_EVENT[event.event_type][each](fields)
    return fields


def read(event: type[E], version: int, document: str, *, keep_unknown: bool = False) -> E:
    """The event that is stored as `document`, in a version that its class knows.

    With `keep_unknown` it goes on with fields that its class does not have.

    Raises:
        ValidationError: it cannot be read; or whatever an upcaster raises.
    """
    if version < event.event_version and event.event_type in _BY_EVENT:
        document = json.dumps(lift(event, version, json.loads(document)))
    return event.model_validate_json(document, extra="allow" if keep_unknown else None)
