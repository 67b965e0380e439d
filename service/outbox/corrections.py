"""Replaying a dead letter with a payload that a person has corrected.

What must stay true: the consumer reads what was meant. So the correction is checked as `publish` checks an event,
against the class that the consumer takes; and a field that the class does not have is refused. A consumer passes over
what it does not know, so a misspelt one would let it run with a default, and nobody would notice. What died under an
earlier version is put right as its upcasters make it: as the consumer would have been given it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from service.errors import PublishError
from service.ledger import dead_letters, editing
from service.outbox.consumers import consumer_named
from service.outbox.payloads import payload_of, summary
from service.outbox.upcasting import lift

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.database.driver import Connection
    from service.ledger.editing import Edited
    from service.ledger.replaying import Refusal
    from service.outbox.consumers import Consumer
    from service.outbox.events import Event


_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Correction:
    """A payload as it would be stored, and the names of the fields that a person has changed."""

    payload: dict[str, Any]
    version: int
    fields: list[str]


async def edit(
    connection: Connection, number: int, payload: Mapping[str, Any], *, by: str, why: str | None
) -> Edited | Refusal:
    """Publish a dead letter's event anew with this payload, for its consumer alone, and close the dead letter.

    Args:
        connection: One that reads JSON (`driver.read_json`).
        number: Of the dead letter.
        payload: All of it, as JSON has it, of the version that `as_read_now` tells.
        by: Who does it, for the record.
        why: And why.

    Returns:
        What was done, or why the dead letter was left alone.

    Raises:
        PublishError: its consumer could not read this payload, or it is that of the dead letter.
        OutboxError: the event has no number left for another delivery.
    """
    letter = await dead_letters.look_up(connection, number)
    if letter is None:
        return None
    correction = correct(letter, payload)
    return await editing.replace(
        connection, number, correction.payload, correction.version, fields=correction.fields, by=by, why=why
    )


def read_payload(text: str) -> dict[str, Any]:
    """A payload that a person has written.

    Raises:
        PublishError: it is none.
    """
    try:
        payload = json.loads(text)
    except ValueError as error:
        raise PublishError(f"this is no JSON: {error}") from None
    if not isinstance(payload, dict):
        raise PublishError("a payload is a JSON object: {...}")
    return payload


def as_read_now(letter: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """A dead letter's payload as its consumer would be given it, to be corrected, and the version that it has then.

    Raises:
        PublishError: this code has no such consumer, or an upcaster fails.
    """
    _, kind = _known(letter)
    fields, stored = copy.deepcopy(letter["payload"]), letter["version"]
    try:
        return lift(kind, stored, fields), kind.event_version
    except Exception as error:
        raise PublishError(
            f"an upcaster of {kind.__name__} cannot read version {stored} of it: {type(error).__name__}: {error}"
        ) from error


def _known(letter: Mapping[str, Any]) -> tuple[Consumer, type[Event]]:
    spec = consumer_named(letter["consumer"])
    kind = None if spec is None else spec.class_of(letter["event_type"])
    if spec is None or kind is None or not spec.knows(letter["event_type"], letter["version"]):
        raise PublishError(
            f"this code has no consumer {letter['consumer']!r} for {letter['event_type']!r}, version "
            f"{letter['version']}: edit with the code that has it"
        )
    return spec, kind


def correct(letter: Mapping[str, Any], payload: Mapping[str, Any]) -> Correction:
    """What would be stored in place of this dead letter's payload; the domains have been discovered.

    Raises:
        PublishError: its consumer could not read it, or nothing differs.
    """
    spec, kind = _known(letter)
    before, _ = as_read_now(letter)
    names = before.keys() | payload.keys()
    fields = sorted(each for each in names if before.get(each, _ABSENT) != payload.get(each, _ABSENT))
    if not fields:
        raise PublishError("nothing differs from what died: replay it as it is")
    # What was stored under a name that the class has dropped since is passed over, as ever.
    if unknown := (payload.keys() - kind.model_fields.keys()).intersection(fields):
        raise PublishError(
            f"{kind.__name__} has no field {', '.join(sorted(unknown))}; it has "
            f"{', '.join(kind.model_fields) or 'none'}"
        )
    if spec.order is not None and spec.order.field in fields:
        raise PublishError(
            f"{spec.order.field} says in which lane it stands: discard the dead letter, and publish what was meant"
        )
    try:
        event = kind.model_validate_json(json.dumps(payload))
    except ValidationError as error:
        raise PublishError(f"{letter['consumer']} could not read this: {summary(error)}") from None
    return Correction(payload_of(event), kind.event_version, fields)
