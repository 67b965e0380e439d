"""Relays and workers: who is alive, and who has fallen silent."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.console.ledger_looks import LedgerLooks
from service.console.permissions import Viewer
from service.console.rendering import page
from service.ledger.statistics import ALIVE

router = APIRouter()


@router.get("/processes")
async def list_processes(request: Request, caller: Viewer) -> Response:
    """Those that reported in the last hour."""
    looks: LedgerLooks = request.app.state.looks
    return page(request, "processes.html", processes=await looks.processes.get(), alive=ALIVE)
