"""Cursor pagination: `?limit=20&cursor=…` gives `{"items": […], "next_cursor": "…"}`, the newest first.

The cursor is the last row's id, which is in order of time (UUID v7), so that pages neither skip nor repeat rows while
others are added, and the millionth page costs what the first one does.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar
from uuid import UUID

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from sqlalchemy import Select
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import InstrumentedAttribute

T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    """One page, the newest first."""

    items: list[T]
    next_cursor: str | None = Field(description="Pass it as `cursor` for the next page; null on the last one")


class _PageQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100, description="Items per page")
    cursor: str | None = Field(
        None, pattern="^[A-Za-z0-9_-]{22}$", description="`next_cursor` of the page before; absent for the first one"
    )


PageQuery = Annotated[_PageQuery, Query()]
"""The page a client asks for: `async def list_orders(query: PageQuery, session: Session)`."""


async def page_of(
    session: AsyncSession, select: Select[Any], key: InstrumentedAttribute[UUID], query: _PageQuery
) -> tuple[list[Any], str | None]:
    """The rows of one page of `select`, and the cursor of the next one."""
    if query.cursor is not None:
        select = select.where(key < _decoded(query.cursor))
    rows = list(await session.scalars(select.order_by(key.desc()).limit(query.limit + 1)))
    more = len(rows) > query.limit
    rows = rows[: query.limit]
    return rows, _encoded(getattr(rows[-1], key.key)) if more else None


def _encoded(last: UUID) -> str:
    return urlsafe_b64encode(last.bytes).decode().rstrip("=")


def _decoded(cursor: str) -> UUID:
    return UUID(bytes=urlsafe_b64decode(cursor + "=="))
