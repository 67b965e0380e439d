"""Lanes that stand: how many wait in each, and for what; repairing one that waits for nothing."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import OwnForm
from service.console.ledger_looks import LANES, LedgerLooks
from service.console.looks import ConsolePool
from service.console.permissions import Acting, Viewer
from service.console.rendering import page
from service.ledger import lanes

router = APIRouter(prefix="/lanes")


@router.get("")
async def list_lanes(request: Request, caller: Viewer) -> Response:
    """The worst first."""
    looks: LedgerLooks = request.app.state.looks
    return page(request, "lanes.html", lanes=await looks.lanes.get(), most=LANES)


@router.get("/repair")
async def ask_about_lane(request: Request, caller: Acting, lane: str) -> Response:
    """What will happen, and why it should."""
    return page(request, "lane.html", lane=lane)


@router.post("/repair")
async def repair_lane(request: Request, caller: Acting, form: OwnForm) -> Response:
    """Let it go on; if something of it runs or blocks by now, nothing is done."""
    acting: ConsolePool = request.app.state.acting
    async with acting() as connection:
        await lanes.repair(connection, form["lane"], by=caller.name, why=form.why)
    looks: LedgerLooks = request.app.state.looks
    looks.lanes.forget()
    return RedirectResponse("/lanes", 303)
