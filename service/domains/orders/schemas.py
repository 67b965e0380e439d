"""What the API takes and gives."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt

from service.domains.orders.models import OrderStatus

__all__ = ["LineWrite", "OrderRead", "PlaceOrder", "ProductRead", "ProductWrite"]

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


class _Write(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Read(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ProductWrite(_Write):
    """A product to add."""

    name: Name
    stock: Count = Field(ge=0, le=1_000_000_000, examples=[100])


class ProductRead(_Read):
    """A product."""

    id: UUID
    name: str
    stock: int
    created_at: datetime


class LineWrite(_Write):
    """How many of a product; each product once per order."""

    product_id: UUID
    quantity: Count = Field(ge=1, le=1_000, examples=[2])


class PlaceOrder(_Write):
    """An order to place."""

    email: Email
    lines: list[LineWrite] = Field(min_length=1, max_length=50)


class LineRead(_Read):
    """A line of an order."""

    product_id: UUID
    quantity: int


class OrderRead(_Read):
    """An order. `status` is `placed` until the stock was looked at."""

    id: UUID
    email: str
    status: OrderStatus
    created_at: datetime
    lines: list[LineRead]
