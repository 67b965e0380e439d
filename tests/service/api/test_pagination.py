"""Pages, by cursor: nothing is skipped and nothing repeated, whatever is added meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import Column, MetaData, Table, Uuid, select
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute

from service.http.callers import PUBLIC
from service.http.pagination import Page, PageQuery, page_of
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import new_id
from tests.service.api.problems import assert_problem
from tests.service.api.serving import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from tests.service.api.conftest import MakeApp, Sql


class Base(DeclarativeBase):
    """Apart from the service's tables."""

    metadata = MetaData()


class Item(Base):
    """A row."""

    __table__ = Table("item", Base.metadata, Column("id", Uuid, primary_key=True))
    id: InstrumentedAttribute[UUID]


class ItemRead(BaseModel):
    """A row as the API gives it."""

    id: UUID


router = APIRouter(dependencies=[PUBLIC])


@router.get("/items")
async def list_items(query: PageQuery, session: Session) -> Page[ItemRead]:
    """The rows."""
    rows, next_cursor = await page_of(session, select(Item), Item.id, query)
    return Page(items=[ItemRead(id=row.id) for row in rows], next_cursor=next_cursor)


@pytest.fixture
def stored(sql: Sql) -> list[str]:
    """The ids of seven rows, the newest first."""
    sql("CREATE TABLE item (id uuid PRIMARY KEY)")
    return [_add(sql) for _ in range(7)][::-1]


def _add(sql: Sql) -> str:
    id_ = str(new_id())
    sql(f"INSERT INTO item VALUES ('{id_}')")
    return id_


@pytest.fixture
async def client(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app()
    app.include_router(router)
    async with serve(app) as client:
        yield client


@pytest.mark.parametrize("limit", [1, 3, 6, 7, 8])
async def test_pages_give_every_row_once_the_newest_first(
    client: httpx.AsyncClient, sql: Sql, stored: list[str], limit: int
) -> None:
    found: list[str] = []
    sizes: list[int] = []
    cursor: dict[str, str] = {}
    while len(sizes) <= len(stored):
        page = (await client.get("/items", params={"limit": limit, **cursor})).json()
        found += [item["id"] for item in page["items"]]
        sizes.append(len(page["items"]))
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
        _add(sql)
    assert found == stored
    assert all(size == limit for size in sizes[:-1])
    assert sizes[-1] > 0


async def test_an_empty_list(client: httpx.AsyncClient, sql: Sql) -> None:
    sql("CREATE TABLE item (id uuid PRIMARY KEY)")
    assert (await client.get("/items")).json() == {"items": [], "next_cursor": None}


async def test_a_query_that_makes_no_sense_is_refused(client: httpx.AsyncClient) -> None:
    for query in ("limit=0", "limit=101", "limit=x", "cursor=short", "cursor=", "cursor=%00", "p=2"):
        assert_problem(await client.get(f"/items?{query}"), 422, "invalid_request")
