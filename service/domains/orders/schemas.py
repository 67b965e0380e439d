"""What the API takes and gives."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from pydantic import BaseModel, Field

from service.domains.orders.models import OrderStatus
from service.http.fields import Count, Email, Name


class ProductWrite(BaseModel, extra="forbid"):
    """A product to add."""

    name: Name
    stock: Count = Field(ge=0, le=1_000_000_000, examples=[100])


class ProductRead(BaseModel, from_attributes=True):
    """A product."""

    id: UUID
    name: str
    stock: int
    created_at: datetime


class LineWrite(BaseModel, extra="forbid"):
    """How many of a product; each product once per order."""

    product_id: UUID
    quantity: Count = Field(ge=1, le=1_000, examples=[2])


class PlaceOrder(BaseModel, extra="forbid"):
    """An order to place."""

    email: Email
    lines: list[LineWrite] = Field(min_length=1, max_length=50)


class LineRead(BaseModel, from_attributes=True):
    """A line of an order."""

    product_id: UUID
    quantity: int


class OrderRead(BaseModel, from_attributes=True):
    """An order. `status` is `placed` until the stock was looked at."""

    id: UUID
    email: str
    status: OrderStatus
    created_at: datetime
    lines: list[LineRead]
