"""FastAPI and SQLAlchemy as their documentation puts them together: without limits, logs, a guard or a ledger.

It stores what the benchmark's `/row/0` stores.
"""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from service.outbox import new_id
from tests.proof.bench.app import ORDER, Order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["create_app"]

_url = os.environ["DATABASE__URL"].replace("postgresql:", "postgresql+asyncpg:", 1)
_engine = create_async_engine(_url, pool_size=16, max_overflow=0)
_sessions = async_sessionmaker(_engine)


async def _session() -> AsyncIterator[AsyncSession]:
    async with _sessions() as session, session.begin():
        yield session


@asynccontextmanager
async def _lifespan(_app: FastAPI) -> AsyncIterator[None]:
    yield
    await _engine.dispose()


def create_app() -> FastAPI:
    """An application with one route."""
    app = FastAPI(lifespan=_lifespan)

    @app.post("/plain/row", status_code=201)
    async def store_row(body: Order, session: Annotated[AsyncSession, Depends(_session, scope="function")]) -> Order:
        order_id = new_id()
        await session.execute(text(ORDER), {"id": order_id, "customer": body.customer})
        return Order(customer=body.customer, id=order_id)

    return app
