"""Probes: `/health/live` is about this process, `/health/ready` about whether it can do its work.

What must stay true: a liveness probe never touches the database, for restarting every process does not bring a
database back.
"""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from service.database.revisions import applied
from service.errors import DatabaseUnavailableError
from service.http.callers import PUBLIC
from service.http.problems import RETRY_AFTER, documented, problem
from service.telemetry.logs import get_logger

READY_WITHIN = 2.0
"""Seconds the database may take to answer."""

router = APIRouter(prefix="/health", tags=["health"], dependencies=[PUBLIC])
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
            async with request.app.state.engine.connect() as connection:
                found = await applied(lambda statement: connection.scalars(text(statement)))
    except (TimeoutError, DatabaseUnavailableError, SQLAlchemyError) as error:
        _log.warning("health.not_ready", error=type(error).__name__)
        return problem(503, code="database_unavailable", detail="The database does not answer.", headers=RETRY_AFTER)
    if missing := request.app.state.revisions.missing(found or set()):
        _log.warning("health.not_migrated", missing=sorted(missing))
        return problem(503, code="not_migrated", detail="Run: alembic upgrade heads", headers=RETRY_AFTER)
    return Health()
