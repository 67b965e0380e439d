"""Tables of the orders domain."""

from __future__ import annotations

from datetime import date, datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import CheckConstraint, ForeignKey, Index, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column, relationship

from service.database.base import Base


class OrderStatus(StrEnum):
    """Every order is placed first; the stock decides what becomes of it."""

    PLACED = "placed"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"


class Product(Base):
    """Something that can be ordered while `stock` lasts."""

    __tablename__ = "product"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    stock: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True))

    __table_args__ = (CheckConstraint("stock >= 0", name="stock"),)


class Order(Base):
    """What a customer, its owner, wants. The stock taken always equals the quantities of the confirmed orders."""

    __tablename__ = "customer_order"  # "order" is a word of SQL

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(Text)
    email: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True))
    lines: Mapped[list[OrderLine]] = relationship(order_by="OrderLine.product_id", lazy="selectin")

    __table_args__ = (
        CheckConstraint("status IN ('placed', 'confirmed', 'rejected')", name="status"),
        Index("ix_customer_order_owner_id", "owner", "id"),
    )


class OrderLine(Base):
    """How many of one product an order wants."""

    __tablename__ = "order_line"

    order_id: Mapped[UUID] = mapped_column(ForeignKey("customer_order.id", ondelete="CASCADE"), primary_key=True)
    product_id: Mapped[UUID] = mapped_column(ForeignKey("product.id"), primary_key=True, index=True)
    quantity: Mapped[int]

    __table_args__ = (CheckConstraint("quantity > 0", name="quantity"),)


class DailySales(Base):
    """How many orders were placed on a day (UTC)."""

    __tablename__ = "daily_sales"

    day: Mapped[date] = mapped_column(primary_key=True)
    orders: Mapped[int]
