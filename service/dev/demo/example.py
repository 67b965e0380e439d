"""All that the demo knows of the example domain: how customers order, what the tables hold, where work waits."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from service.dev.demo.stage import REJECTED

QUEUES = ("stock", "email")

HOLD_WORK = "LOCK TABLE daily_sales IN SHARE MODE"
"""In a transaction: until it ends, `count_sales` waits, in the middle of its work."""

ORDERS = "SELECT id::text, email FROM customer_order"

EFFECTS = """
SELECT (SELECT count(*) FROM customer_order WHERE status = 'placed') AS undecided,
       (SELECT count(*) FROM customer_order WHERE status = 'confirmed') AS confirmed,
       (SELECT count(*) FROM customer_order WHERE status = 'rejected') AS rejected,
       (SELECT coalesce(sum(orders), 0) FROM daily_sales)::bigint AS counted,
       (SELECT coalesce(sum(stock), 0) FROM product)::bigint AS stock_left,
       (SELECT coalesce(sum(quantity), 0) FROM order_line JOIN customer_order ON customer_order.id = order_id
        WHERE status = 'confirmed')::bigint AS sold
"""

_CLIENTS = 12
_PAUSE = 0.4
"""Seconds between two orders of a client, so that there is time to break things."""

_STOCKS = {"Tea": 100_000, "Coffee": 100_000, "Last cup": 15}


@dataclass
class Load:
    """Concurrent clients that place `wanted` orders, and keep their own record of what was accepted.

    Attributes:
        token: Who they are; they share one.
        accepted: The ids that the API answered with, by address.
        refusals: Answers other than 201.
    """

    url: str
    token: str
    wanted: int
    accepted: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    hurry: bool = False
    """Stop pausing between orders."""
    stock: int = sum(_STOCKS.values())
    """All items there are before the first order."""
    _next: int = 0
    _products: list[str] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(2))  # noqa: S311  no secret

    async def run(self) -> None:
        """Add the products, then let all clients place orders until there are enough."""
        caller = {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(base_url=self.url, headers=caller, timeout=15, trust_env=False) as client:
            for name, stock in _STOCKS.items():
                answer = await client.post("/products", json={"name": name, "stock": stock})
                self._products.append(answer.raise_for_status().json()["id"])
            await asyncio.gather(*(self._client(client) for _ in range(_CLIENTS)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while self._next < self.wanted:
            self._next += 1
            await self._place(client, self._next)
            if not self.hurry:
                await asyncio.sleep(_PAUSE * self._random.uniform(0.5, 1.5))

    async def _place(self, client: httpx.AsyncClient, number: int) -> None:
        email = f"customer{number}{REJECTED if number % 20 == 0 else '@example.com'}"
        *ample, scarce = self._products
        chosen = self._random.sample(ample, k=self._random.choice((1, 1, 2)))
        if number % 8 == 0:
            chosen.append(scarce)
        lines = [{"product_id": product, "quantity": self._random.randint(1, 3)} for product in chosen]
        answer = await self._post(client, {"email": email, "lines": lines})
        if answer is not None and answer.status_code == 201:
            self.accepted[email] = answer.json()["id"]
        else:
            self.refusals.append(f"{email}: {answer.status_code if answer is not None else 'no answer'}")

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response | None:
        # The key makes it safe to ask again when the answer was lost, or was "try again".
        headers = {"Idempotency-Key": str(uuid4())}
        answer = None
        for _ in range(5):
            try:
                answer = await client.post("/orders", json=body, headers=headers)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code < 500:
                return answer
            await asyncio.sleep(0.5)
        return answer


def try_it(url: str, token: str, *, refused: bool = False) -> str:
    """A curl line that places an order, for a product that is made here if there is none yet.

    Args:
        url: Where the API is.
        token: Who places it.
        refused: Whether to place the first order here, for an address that the mail server refuses.
    """
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False) as client:
        products = client.get("/products").raise_for_status().json()["items"]
        if not products:
            products = [client.post("/products", json={"name": "Tea", "stock": 1000}).raise_for_status().json()]
            if refused:
                line = {"product_id": products[0]["id"], "quantity": 1}
                client.post("/orders", json={"email": f"bob{REJECTED}", "lines": [line]}).raise_for_status()
    body = f'{{"email": "ada@example.com", "lines": [{{"product_id": "{products[0]["id"]}", "quantity": 2}}]}}'
    caller = '-H "Authorization: Bearer $(make -s token)"'
    return f"curl {url}/orders {caller} -H 'Content-Type: application/json' -d '{body}'"
