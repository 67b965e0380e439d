"""HTTP routes of the orders domain."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, BackgroundTasks, Response
from sqlalchemy import select

from service.domains.orders.errors import DuplicateProductError, UnknownOrderError, UnknownProductError
from service.domains.orders.events import OrderPlaced
from service.domains.orders.models import Order, OrderLine, OrderStatus, Product
from service.domains.orders.schemas import OrderRead, PlaceOrder, ProductRead, ProductWrite
from service.http.callers import PUBLIC
from service.http.idempotency import IdempotentRoute
from service.http.openapi import ID, created
from service.http.pagination import Page, PageQuery, page_of
from service.http.problems import problem_responses
from service.http.request_session import Session
from service.identity import Principal, needs
from service.outbox import new_id, publish
from service.telemetry.logs import get_logger

# This class makes every POST of this router repeatable under an Idempotency-Key, by the same caller.
router = APIRouter(route_class=IdempotentRoute)

# Every route says who may call it: by one of these, by a scope among its dependencies, or by `PUBLIC`.
Buyer = Annotated[Principal, needs("orders:write")]
Reader = Annotated[Principal, needs("orders:read")]

_log = get_logger(__name__)

# The OpenAPI document tells how to order what was just added, and so the tests of the API do.
_ORDER_IT = {"email": "ada@example.com", "lines": [{"product_id": ID, "quantity": 1}]}


@router.post(
    "/products",
    status_code=201,
    tags=["products"],
    dependencies=[needs("products:write")],
    responses=created(order=("place_order", _ORDER_IT)),
)
async def add_product(body: ProductWrite, session: Session, response: Response) -> ProductRead:
    """Add a product."""
    product = Product(id=new_id(), name=body.name, stock=body.stock, created_at=datetime.now(UTC))
    session.add(product)
    response.headers["Location"] = f"/products/{product.id}"
    return ProductRead.model_validate(product)


@router.get("/products", tags=["products"], dependencies=[PUBLIC])
async def list_products(query: PageQuery, session: Session) -> Page[ProductRead]:
    """The products, the newest first."""
    rows, next_cursor = await page_of(session, select(Product), Product.id, query)
    return Page(items=[ProductRead.model_validate(row) for row in rows], next_cursor=next_cursor)


@router.get(
    "/products/{product_id}",
    tags=["products"],
    dependencies=[PUBLIC],
    responses=problem_responses(UnknownProductError),
)
async def get_product(product_id: UUID, session: Session) -> ProductRead:
    """One product, with the stock that is left."""
    product = await session.get(Product, product_id)
    if product is None:
        raise UnknownProductError(f"There is no product {product_id}.")
    return ProductRead.model_validate(product)


@router.post("/orders", status_code=201, tags=["orders"], responses=created() | problem_responses(UnknownProductError))
async def place_order(
    caller: Buyer, body: PlaceOrder, session: Session, tasks: BackgroundTasks, response: Response
) -> OrderRead:
    """Place an order; whether the stock suffices is decided afterwards."""
    wanted = {line.product_id for line in body.lines}
    if unknown := wanted - set(await session.scalars(select(Product.id).where(Product.id.in_(wanted)))):
        raise UnknownProductError(f"There is no product {min(unknown)}.")
    if len(wanted) < len(body.lines):
        raise DuplicateProductError("Several lines want the same product: add up their quantities.")
    order = Order(
        id=new_id(), owner=caller.id, email=body.email, status=OrderStatus.PLACED, created_at=datetime.now(UTC)
    )
    order.lines = [OrderLine(product_id=line.product_id, quantity=line.quantity) for line in body.lines]
    session.add(order)
    # Must happen: committed with the order, it survives every crash until a worker has done it.
    publish(session, OrderPlaced(order_id=order.id))
    # May be lost: runs in this process after the response, and is gone if the process ends before.
    tasks.add_task(_log.info, "order.noted", order_id=str(order.id), lines=len(order.lines))
    response.headers["Location"] = f"/orders/{order.id}"
    return OrderRead.model_validate(order)


@router.get("/orders", tags=["orders"])
async def list_orders(caller: Reader, query: PageQuery, session: Session) -> Page[OrderRead]:
    """The caller's orders, the newest first."""
    rows, next_cursor = await page_of(session, select(Order).where(Order.owner == caller.id), Order.id, query)
    return Page(items=[OrderRead.model_validate(row) for row in rows], next_cursor=next_cursor)


@router.get("/orders/{order_id}", tags=["orders"], responses=problem_responses(UnknownOrderError))
async def get_order(caller: Reader, order_id: UUID, session: Session) -> OrderRead:
    """One of the caller's orders."""
    order = await session.get(Order, order_id)
    if order is None or order.owner != caller.id:  # whether somebody else has it is not said either
        raise UnknownOrderError(f"There is no order {order_id}.")
    return OrderRead.model_validate(order)
