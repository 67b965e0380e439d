"""The session of a request, and the one place where it commits.

What must stay true: a handler never calls `commit()`. One request is one transaction; the session dependency commits
it after the handler returned and before the response leaves, so a success status means committed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator  # noqa: TC003  FastAPI resolves the dependency's annotations at run time
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from sqlalchemy.ext.asyncio import AsyncSession

from service.database.sessions import transaction

if TYPE_CHECKING:
    from service.database.sessions import SessionFactory


async def _request_session(request: Request) -> AsyncIterator[AsyncSession]:
    sessions: SessionFactory = request.app.state.sessions
    async with transaction(sessions) as session:
        yield session


# The scope matters: a plain dependency with `yield` ends after the response was sent, so a client could read
# "201 Created" of an order whose commit then fails.
Session = Annotated[AsyncSession, Depends(_request_session, scope="function")]
"""The request's session: `async def handler(session: Session)`. Commits when the handler returns."""
