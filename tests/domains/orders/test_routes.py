"""Products and orders over HTTP."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from tests.domains.orders.conftest import Shop


async def test_a_product_is_added_and_found(client: httpx.AsyncClient) -> None:
    answer = await client.post("/products", json={"name": "Tea, 100 g", "stock": 5})
    product = answer.json()
    assert answer.status_code == 201
    assert (product["name"], product["stock"]) == ("Tea, 100 g", 5)
    assert UUID(product["id"]).version == 7
    assert product["created_at"].endswith("Z")
    assert abs(datetime.fromisoformat(product["created_at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert (await client.get(answer.headers["Location"])).json() == product
    assert (await client.get("/products")).json() == {"items": [product], "next_cursor": None}


async def test_an_order_is_placed_with_its_event(shop: Shop) -> None:
    first, second = await shop.add_product(5), await shop.add_product(5)
    lines = [{"product_id": second, "quantity": 2}, {"product_id": first, "quantity": 1}]
    answer = await shop.client.post("/orders", json={"email": "ada@example.com", "lines": lines})
    order = answer.json()
    assert answer.status_code == 201
    assert order["status"] == "placed"
    found = await shop.get(answer.headers["Location"])
    assert {**found, "lines": None} == {**order, "lines": None}
    assert sorted(found["lines"], key=str) == sorted(order["lines"], key=str) == sorted(lines, key=str)
    assert [each["id"] for each in (await shop.get("/orders"))["items"]] == [order["id"]]
    published = (
        "SELECT string_agg(consumer || ' ' || (payload->>'order_id'), ', ' ORDER BY consumer) FROM outbox_message"
    )
    assert await shop.scalar(published) == f"orders.count_sales {order['id']}, orders.reserve_stock {order['id']}"


async def test_an_order_repeated_under_its_key_is_placed_once(shop: Shop) -> None:
    product = await shop.add_product(5)
    body = {"email": "ada@example.com", "lines": [{"product_id": product, "quantity": 1}]}
    headers = {"Idempotency-Key": f'"{uuid4()}"'}
    answers = [await shop.client.post("/orders", json=body, headers=headers) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert await shop.scalar("SELECT count(*) FROM customer_order") == 1
    assert len(await shop.deliveries("orders.reserve_stock")) == 1


async def test_an_order_is_its_owners(shop: Shop, authorized: Callable[..., dict[str, str]]) -> None:
    product = await shop.add_product(5)
    order = await shop.order({product: 1})
    mine, yours = await shop.client.get("/orders"), await shop.client.get("/orders", headers=authorized("bob"))
    assert [each["id"] for each in mine.json()["items"]] == [order]
    assert yours.json() == {"items": [], "next_cursor": None}
    for path in (f"/orders/{order}", f"/orders/{uuid4()}"):
        answer = await shop.client.get(path, headers=authorized("bob"))
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_order")


async def test_a_key_that_somebody_else_guesses_leads_to_nothing(
    shop: Shop, authorized: Callable[..., dict[str, str]]
) -> None:
    product = await shop.add_product(5)
    body = {"email": "ada@example.com", "lines": [{"product_id": product, "quantity": 1}]}
    key = {"Idempotency-Key": "guessed"}
    mine = await shop.client.post("/orders", json=body, headers=key)
    yours = await shop.client.post("/orders", json=body, headers=key | authorized("bob"))
    assert (mine.status_code, yours.status_code) == (201, 201)
    assert mine.json()["id"] != yours.json()["id"]
    assert await shop.scalar("SELECT count(*) FROM customer_order") == 2


@pytest.mark.parametrize(
    ("method", "path", "scope", "status"),
    [
        ("GET", "/products", "", 200),
        ("POST", "/products", "", 401),
        ("POST", "/products", "orders:write", 403),
        ("GET", "/orders", "", 401),
        ("GET", "/orders", "orders:write", 403),
        ("GET", f"/orders/{UUID(int=1)}", "", 401),
        ("GET", f"/orders/{UUID(int=1)}", "orders:write", 403),
        ("POST", "/orders", "", 401),
        ("POST", "/orders", "orders:read", 403),
    ],
)
async def test_who_may_do_what(
    client: httpx.AsyncClient,
    authorized: Callable[..., dict[str, str]],
    method: str,
    path: str,
    scope: str,
    status: int,
) -> None:
    del client.headers["Authorization"]
    headers = authorized("ada", scope) if scope else {}
    assert (await client.request(method, path, headers=headers)).status_code == status


async def test_an_unknown_product_places_nothing(shop: Shop) -> None:
    known = await shop.add_product(5)
    lines = [{"product_id": known, "quantity": 1}, {"product_id": str(uuid4()), "quantity": 1}]
    answer = await shop.client.post("/orders", json={"email": "ada@example.com", "lines": lines})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_product")
    stored = "SELECT (SELECT count(*) FROM customer_order) + (SELECT count(*) FROM outbox_message)"
    assert await shop.scalar(stored) == 0


async def test_a_product_is_ordered_once_per_order(shop: Shop) -> None:
    product = await shop.add_product(5)
    lines = [{"product_id": product, "quantity": 1}, {"product_id": product, "quantity": 2}]
    answer = await shop.client.post("/orders", json={"email": "ada@example.com", "lines": lines})
    assert (answer.status_code, answer.json()["code"]) == (422, "duplicate_product")
    assert await shop.scalar("SELECT count(*) FROM customer_order") == 0


LINE = {"product_id": str(UUID(int=1)), "quantity": 1}


NONSENSE: list[dict[str, Any]] = [
    {"email": "ada@example.com", "lines": []},
    {"email": "ada@example.com", "lines": [LINE] * 51},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": 0}]},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": 1_001}]},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": 10**30}]},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": "1"}]},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": 1.5}]},
    {"email": "ada@example.com", "lines": [LINE | {"quantity": True}]},
    {"email": "ada@example.com", "lines": [LINE | {"product_id": "1"}]},
    {"email": "ada@example.com", "lines": [LINE | {"price": 1}]},
    {"email": "ada", "lines": [LINE]},
    {"email": "ada@example.com\r\nBcc: all@example.com", "lines": [LINE]},
    {"email": "ada@example.com\n", "lines": [LINE]},
    {"email": "a" * 250 + "@example.com", "lines": [LINE]},
    {"lines": [LINE]},
]


async def test_an_order_that_makes_no_sense_is_refused(client: httpx.AsyncClient) -> None:
    for body in NONSENSE:
        answer = await client.post("/orders", json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), body


async def test_a_product_that_makes_no_sense_is_refused(client: httpx.AsyncClient) -> None:
    wrong: list[dict[str, Any]] = [
        {"name": "a\x00b"},
        {"name": ""},
        {"name": "x" * 201},
        {"stock": -1},
        {"stock": 2**31},
    ]
    for product in wrong:
        answer = await client.post("/products", json={"name": "Tea", "stock": 1} | product)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), product


async def test_what_does_not_exist_is_not_found(client: httpx.AsyncClient) -> None:
    for path, code in (("/orders", "unknown_order"), ("/products", "unknown_product")):
        answer = await client.get(f"{path}/{uuid4()}")
        assert (answer.status_code, answer.json()["code"]) == (404, code)


async def test_orders_and_events_match_after_a_rush(shop: Shop) -> None:
    product = await shop.add_product(5)
    unknown = str(uuid4())

    async def place(number: int) -> int:
        lines = [{"product_id": unknown if number % 3 == 0 else product, "quantity": 1}]
        return (await shop.client.post("/orders", json={"email": "ada@example.com", "lines": lines})).status_code

    statuses = await asyncio.gather(*map(place, range(30)))
    assert (statuses.count(201), statuses.count(404)) == (20, 10)
    orders = "SELECT count(*) FROM customer_order"
    matched = "SELECT count(*) FROM outbox_message JOIN customer_order o ON payload->>'order_id' = o.id::text"
    assert await shop.scalar(orders) == 20
    assert await shop.scalar(matched) == await shop.scalar("SELECT count(*) FROM outbox_message") == 40
