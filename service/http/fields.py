"""Fields of what the API takes. Each says in the OpenAPI document exactly what is accepted."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, StrictInt

# No control characters: PostgreSQL cannot store NUL, and the others only ever do harm in a name.
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1F\x7F]+$", examples=["Tea, 100 g"])]
# Narrower than RFC 5321 on purpose: what the pattern lets through is an address that ends up in a header.
Email = Annotated[
    str,
    Field(
        max_length=254,
        pattern=r"^[A-Za-z0-9._%+-]{1,64}@([A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}$",
        examples=["ada@example.com"],
    ),
]


def _integral(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Neither "2" nor true is a number, but 2.0 is one to JSON, which does not tell it from 2.
Count = Annotated[StrictInt, BeforeValidator(_integral)]
