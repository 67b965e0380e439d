"""Who did what, when and why."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.console.looks import ConsolePool
from service.console.permissions import Viewer
from service.console.rendering import page
from service.ledger.audit import AuditFilter, acts

router = APIRouter()

SHOWN = 200

KINDS = (
    "replay", "discard", "edit", "reveal", "search", "pause", "resume", "run", "limit", "unlimit", "repair", "stop",
    "erase",
)  # fmt: skip


@router.get("/audit")
async def list_acts(request: Request, caller: Viewer, kind: str = "", by: str = "") -> Response:
    """The latest first."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        found = await acts(connection, AuditFilter(kind or None, by or None), SHOWN)
    return page(request, "audit.html", acts=found, kind=kind, by=by, kinds=KINDS, most=SHOWN)
