"""What the demo and `make dev` know of the example domain's HTTP API."""

from __future__ import annotations

import httpx

__all__ = ["try_it"]


def try_it(url: str) -> str:
    """A curl line that places an order, for a product that is made here if there is none yet."""
    with httpx.Client(base_url=url, trust_env=False) as client:
        products = client.get("/products").raise_for_status().json()["items"]
        if not products:
            products = [client.post("/products", json={"name": "Tea", "stock": 1000}).raise_for_status().json()]
    body = f'{{"email": "ada@example.com", "lines": [{{"product_id": "{products[0]["id"]}", "quantity": 2}}]}}'
    return f"curl {url}/orders -H 'Content-Type: application/json' -d '{body}'"
