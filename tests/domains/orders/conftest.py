"""What a customer does, and what is left of it in the database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text

from service.ledger.tables import OutboxMessage

if TYPE_CHECKING:
    from uuid import UUID

    import httpx

    from service.database.sessions import SessionFactory
    from service.outbox.testing import InlineWorker


class Shop:
    """What a customer does, and the worker's part without a broker."""

    def __init__(self, client: httpx.AsyncClient, worker: InlineWorker, sessions: SessionFactory) -> None:
        self.client = client
        self.worker = worker
        self.sessions = sessions

    async def add_product(self, stock: int) -> str:
        """Add a product and return its id."""
        answer = await self.client.post("/products", json={"name": "Tea", "stock": stock})
        assert answer.status_code == 201
        id_: str = answer.json()["id"]
        return id_

    async def order(self, quantities: dict[str, int], email: str = "ada@example.com") -> str:
        """Place an order and return its id."""
        lines = [{"product_id": id_, "quantity": quantity} for id_, quantity in quantities.items()]
        answer = await self.client.post("/orders", json={"email": email, "lines": lines})
        assert answer.status_code == 201, answer.text
        id_: str = answer.json()["id"]
        return id_

    async def get(self, path: str) -> Any:
        """A resource's JSON."""
        return (await self.client.get(path)).json()

    async def deliveries(self, consumer: str, state: str = "pending") -> list[UUID]:
        """Ids of the deliveries to a consumer in a state."""
        query = select(OutboxMessage.id).where(OutboxMessage.consumer == consumer, OutboxMessage.state == state)
        async with self.sessions() as session:
            return list(await session.scalars(query.order_by(OutboxMessage.id)))

    async def scalar(self, statement: str) -> Any:
        """The result of a query."""
        async with self.sessions() as session:
            return await session.scalar(text(statement))


@pytest.fixture
def shop(client: httpx.AsyncClient, worker: InlineWorker, sessions: SessionFactory) -> Shop:
    """The shop, open."""
    return Shop(client, worker, sessions)
