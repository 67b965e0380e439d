"""Probes: `/health/live` is about this process, `/health/ready` about whether it can do its work.

What must stay true: a liveness probe never touches the database, for restarting every process does not bring a
database back. Readiness passes on a schema that is newer than this code: migrations run before the new version is
rolled out, and the old one has to serve until then.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service.errors import DatabaseUnavailableError
from service.http.problems import RETRY_AFTER, documented, problem
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

READY_WITHIN = 2.0
"""Seconds the database may take to answer."""

router = APIRouter(prefix="/health", tags=["health"])
_log = get_logger(__name__)


class Health(BaseModel):
    """A passed probe."""

    status: Literal["ok"] = "ok"


@router.get("/live")
async def live() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/ready", response_model=Health, responses={503: documented("Not ready")})
async def ready(request: Request) -> Health | Response:
    """Whether the database is reachable and migrated."""
    try:
        async with asyncio.timeout(READY_WITHIN):
            applied = await _applied(request.app.state.engine)
    except (TimeoutError, DatabaseUnavailableError, SQLAlchemyError) as error:
        _log.warning("health.not_ready", error=type(error).__name__)
        return problem(503, code="database_unavailable", detail="The database does not answer.", headers=RETRY_AFTER)
    if missing := request.app.state.revisions.missing(applied):
        _log.warning("health.not_migrated", missing=sorted(missing))
        return problem(503, code="not_migrated", detail="Run: alembic upgrade heads", headers=RETRY_AFTER)
    return Health()


async def _applied(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        if await connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
            return set()
        return set(await connection.scalars(text("SELECT version_num FROM alembic_version")))
