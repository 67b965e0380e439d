"""The processes that are measured: `create_app` for Uvicorn and `setup_broker` for Dramatiq."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, foreign, mapped_column, relationship

import service.api
from service.http.callers import PUBLIC
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.identity import Principal, needs
from service.outbox import Deliveries, Delivery, Event, consumer, new_id, publish
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["EFFECT", "ORDER", "SCHEMA", "create_app", "setup_broker"]

SCHEMA = """
CREATE TABLE bench_product (id uuid PRIMARY KEY);
CREATE TABLE bench_line (
    order_id uuid, product_id uuid REFERENCES bench_product, quantity integer NOT NULL,
    PRIMARY KEY (order_id, product_id)
);
CREATE TABLE bench_order (
    id uuid PRIMARY KEY, customer text NOT NULL, created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE bench_effect (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, order_id uuid NOT NULL, started float8,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO bench_product VALUES ('00000000-0000-4000-8000-000000000001')
"""
PRODUCT = UUID("00000000-0000-4000-8000-000000000001")
ORDER = "INSERT INTO bench_order (id, customer) VALUES (:id, :customer)"
EFFECT = "INSERT INTO bench_effect (order_id, started) VALUES (:id, :started)"
RAW_EFFECT = "INSERT INTO bench_effect (order_id, started) VALUES ($1, $2)"


class _Base(DeclarativeBase):
    """Apart from the service's own, whose tables the migrations must match."""


class _Product(_Base):
    __tablename__ = "bench_product"

    id: Mapped[UUID] = mapped_column(primary_key=True)


class _Order(_Base):
    __tablename__ = "bench_order"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    customer: Mapped[str]
    lines: Mapped[list[_Line]] = relationship(primaryjoin=lambda: _Order.id == foreign(_Line.order_id), lazy="selectin")


class _Line(_Base):
    __tablename__ = "bench_line"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    product_id: Mapped[UUID] = mapped_column(primary_key=True)
    quantity: Mapped[int]


class Ordered(Event, type="bench.ordered"):
    order_id: UUID
    customer: str


class OrderedForTwo(Event, type="bench.ordered_for_two"):
    order_id: UUID
    customer: str


class OrderedForFour(Event, type="bench.ordered_for_four"):
    order_id: UUID
    customer: str


@consumer(Ordered, queue="bench", name="bench.effect")
async def effect(event: Ordered, delivery: Delivery) -> None:
    """One row; it says when this began."""
    started = time.time()
    async with delivery.begin() as session:
        await session.execute(text(EFFECT), {"id": event.order_id, "started": started})


class OrderedByCustomer(Event, type="bench.ordered_by_customer"):
    order_id: UUID
    customer: str


@consumer(OrderedByCustomer, queue="bench", name="bench.in_order", order_by="customer")
async def in_order(event: OrderedByCustomer, delivery: Delivery) -> None:
    """As `effect`, in the order of commits."""
    started = time.time()
    async with delivery.begin() as session:
        await session.execute(text(EFFECT), {"id": event.order_id, "started": started})


class Gathered(Event, type="bench.gathered"):
    order_id: UUID
    customer: str


@consumer(Gathered, queue="bench", name="bench.gather", batch=100)
async def gather(events: list[Gathered], deliveries: Deliveries) -> None:
    """As `effect`, a row for each of a batch."""
    started = time.time()
    async with deliveries.begin() as session:
        await session.execute(text(EFFECT), [{"id": event.order_id, "started": started} for event in events])


class Waited(Event, type="bench.waited"):
    order_id: UUID
    customer: str


@consumer(Waited, queue="bench", name="bench.wait")
async def wait(event: Waited, delivery: Delivery) -> None:
    """As `effect`, after 100 ms of waiting for somebody else's server."""
    started = time.time()
    await asyncio.sleep(0.1)
    async with delivery.begin() as session:
        await session.execute(text(EFFECT), {"id": event.order_id, "started": started})


class Raw(Event, type="bench.raw"):
    order_id: UUID
    customer: str


@consumer(Raw, queue="bench", name="bench.raw")
async def raw(event: Raw, delivery: Delivery) -> None:
    """As `effect`, without a session."""
    started = time.time()
    async with delivery.connection() as connection:
        await connection.execute(RAW_EFFECT, event.order_id, started)


async def nothing(event: Event, delivery: Delivery) -> None:
    """Only there to be a consumer."""


for number in range(2):
    consumer(OrderedForTwo, queue="bench", name=f"bench.two_{number}")(nothing)
for number in range(4):
    consumer(OrderedForFour, queue="bench", name=f"bench.four_{number}")(nothing)

_EVENTS = {0: None, 1: Ordered, 2: OrderedForTwo, 4: OrderedForFour}
_router = APIRouter(dependencies=[PUBLIC])


class Order(BaseModel):
    """What is asked for, and what was stored."""

    customer: str
    id: UUID | None = None


@_router.post("/order/{consumers}", status_code=201)
async def place_order(consumers: int, body: Order, session: Session) -> Order:
    """Look for the product, store an order with a line, and publish it to so many consumers."""
    (product,) = await session.scalars(select(_Product.id).where(_Product.id.in_({PRODUCT})))
    order = _Order(id=new_id(), customer=body.customer)
    order.lines = [_Line(product_id=product, quantity=1)]
    session.add(order)
    _publish(session, consumers, order.id, body.customer)
    return Order(customer=body.customer, id=order.id)


_asking = APIRouter()


@_asking.post("/mine/{consumers}", status_code=201)
async def place_own_order(
    caller: Annotated[Principal, needs("bench")], consumers: int, body: Order, session: Session
) -> Order:
    """The same for a caller who says who they are."""
    return await place_order(consumers, body, session)


@_router.post("/row/{consumers}", status_code=201)
async def store_row(consumers: int, body: Order, session: Session) -> Order:
    """Nothing but one statement, and the event."""
    order_id = new_id()
    await session.execute(text(ORDER), {"id": order_id, "customer": body.customer})
    _publish(session, consumers, order_id, body.customer)
    return Order(customer=body.customer, id=order_id)


def _publish(session: AsyncSession, consumers: int, order_id: UUID, customer: str) -> None:
    kind = _EVENTS[consumers]
    if kind is not None:
        publish(session, kind(order_id=order_id, customer=customer))


def create_app() -> FastAPI:
    """The service's own application, with the benchmark's route."""
    app = service.api.create_app()
    app.include_router(_router)
    app.include_router(_asking)
    return app
