"""Which fields an event may have: IDs and small scalars that come back from the ledger as they went in.

An event is stored as JSON and read by its fields' names. What cannot come back is refused when the class is made, as
far as the class tells; what only a value tells, `publish` refuses (`payloads.py`).
"""

from __future__ import annotations

import types
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Union, get_args, get_origin
from uuid import UUID

from service.errors import EventDefinitionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_JSON = {str: "string", bool: "boolean", int: "number", float: "number", types.NoneType: "null"}
_AS_STRING = (UUID, Decimal, datetime, date, time, timedelta)
_NO_SCALAR = "an event holds IDs and small scalars; store the rest in a row and publish the row's ID"


def check_fields(cls: type[BaseModel]) -> None:
    """Refuse a class of which something would be lost or changed on its way through the ledger.

    Raises:
        EventDefinitionError: naming the field.
    """
    if cls.model_config.get("extra") == "allow":
        raise EventDefinitionError(f"{cls.__name__}: extra='allow' lets anything in: declare its fields")
    for name in cls.__private_attributes__:
        raise EventDefinitionError(f"{cls.__name__}.{name} is private, so it is not stored: make it a field")
    for name, field in cls.model_fields.items():
        problem = _problem(field)
        if problem is not None:
            raise EventDefinitionError(f"{cls.__name__}.{name}: {problem}")


def _problem(field: FieldInfo) -> str | None:
    if any((field.alias, field.validation_alias, field.serialization_alias)):
        return "an event is stored and read under its fields' names: remove the alias"
    if field.exclude or getattr(field, "exclude_if", None):
        return "a field that is excluded is not stored: remove `exclude`, or the field"
    members = list(_members(field.annotation))
    if any(isinstance(member, Enum) for member in members):
        return "a member of an Enum cannot be read back from its value: use the Enum, or Literal of the values"
    forms = [_forms(member) for member in members]
    if set() in forms:
        return _NO_SCALAR
    if sum(map(len, forms)) > len(set().union(*forms)):
        return "two types of this union look alike in JSON, so one would come back as the other: keep one of them"
    return None


def _members(annotation: Any) -> Iterator[Any]:
    """The types a field is made of, and for `Literal` its values."""
    origin = get_origin(annotation)
    if isinstance(annotation, NewType):
        yield from _members(annotation.__supertype__)
    elif origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        yield annotation


def _forms(member: Any) -> set[object]:
    """What a member looks like in JSON: its types, or a value of `Literal` itself; nothing if it is no scalar.

    Whole numbers and others look alike: PostgreSQL writes 5.119868214374454e16 as a whole number, of another value.
    """
    if not isinstance(member, type):
        return {("the value", member)} if isinstance(member, (str, int, types.NoneType)) else set()
    if issubclass(member, Enum):
        forms: set[object] = {_json_form(type(each.value)) for each in member}
        return forms if None not in forms else set()
    if issubclass(member, _AS_STRING):
        return {"string"}
    form = _json_form(member)
    return set() if form is None else {form}


def _json_form(type_: type) -> str | None:
    return next((form for of, form in _JSON.items() if issubclass(type_, of)), None)
