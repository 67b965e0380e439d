"""The API, the worker's runner and a mail server, on a database of the test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select, text

from service.api import create_app
from service.dev.sink import Sink
from service.outbox.runner import Runner
from service.outbox.tables import OutboxMessage
from tests.api.serving import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path
    from uuid import UUID

    import httpx
    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.database import SessionFactory
    from service.settings import Settings


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API."""
    async with serve(create_app(settings)) as client:
        yield client


class Shop:
    """What a customer does, and the worker's part without a broker."""

    def __init__(self, client: httpx.AsyncClient, runner: Runner, sessions: SessionFactory) -> None:
        self.client = client
        self.runner = runner
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

    async def messages(self, consumer: str, state: str = "pending") -> list[UUID]:
        """Ids of the outbox messages of a consumer in a state."""
        query = select(OutboxMessage.id).where(OutboxMessage.consumer == consumer, OutboxMessage.state == state)
        async with self.sessions() as session:
            return list(await session.scalars(query.order_by(OutboxMessage.id)))

    async def deliver(self, consumer: str) -> None:
        """Run the pending deliveries of a consumer, whether or not they are due."""
        async with self.sessions() as session:
            await session.execute(text("UPDATE outbox_message SET due_at = now() WHERE state = 'pending'"))
            await session.commit()
        for id_ in await self.messages(consumer):
            await self.runner.deliver(id_)

    async def scalar(self, statement: str) -> Any:
        """The result of a query."""
        async with self.sessions() as session:
            return await session.scalar(text(statement))


@pytest.fixture
async def shop(
    client: httpx.AsyncClient, settings: Settings, engine: AsyncEngine, sessions: SessionFactory
) -> AsyncIterator[Shop]:
    """The shop, open."""
    runner = Runner(settings, engine)
    await runner.open()
    yield Shop(client, runner, sessions)
    await runner.close()


@pytest.fixture
def worker_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> pytest.MonkeyPatch:
    """The environment that consumers read their settings from, to change."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture
async def sink(tmp_path: Path, worker_environment: pytest.MonkeyPatch) -> AsyncIterator[Path]:
    """A mail server, and the file it writes into; addresses with `refused` in them are refused for good."""
    rejects = tmp_path / "rejects"
    rejects.write_text("refused")
    async with Sink(tmp_path / "mails", rejects) as sink:
        worker_environment.setenv("SMTP__URL", f"smtp://127.0.0.1:{await sink.start()}")
        yield tmp_path / "mails"
