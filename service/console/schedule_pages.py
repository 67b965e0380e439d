"""Schedules: when each fires next and what keeps it from that; pausing, resuming and running them."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import OwnForm
from service.console.looks import ConsolePool
from service.console.permissions import Acting, Viewer
from service.console.rendering import page
from service.database.driver import Connection
from service.ledger import scheduling
from service.ledger.scheduling import Listed

router = APIRouter(prefix="/schedules")

SHOWN = 200

ScheduleAct = Literal["pause", "resume", "run"]


@router.get("")
async def list_schedules(request: Request, caller: Viewer, name: str = "", standing: bool = False) -> Response:
    """By name; those whose name has this in it, or that do not go on."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        found = await scheduling.list_all(connection, having=name, only_standing=standing, limit=SHOWN + 1)
    return page(
        request,
        "schedules.html",
        schedules=found[:SHOWN],
        more=len(found) > SHOWN,
        most=SHOWN,
        name=name,
        standing=standing,
    )


@router.get("/{act}")
async def ask_about_schedule(request: Request, caller: Acting, act: ScheduleAct, schedule: str) -> Response:
    """What will happen, and why it should."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        found = await _known(connection, schedule)
    return page(request, "schedule.html", act=act, schedule=found)


@router.post("/{act}")
async def change_schedule(request: Request, caller: Acting, act: ScheduleAct, form: OwnForm) -> Response:
    """Pause it, resume it or run it once; if somebody has paused or resumed it meanwhile, it is so."""
    acting: ConsolePool = request.app.state.acting
    why = form.why
    async with acting() as connection:
        name = (await _known(connection, form["schedule"])).name
        if act == "run":
            event_id = await scheduling.run(connection, name, by=caller.name, why=why)
            return RedirectResponse(f"/events/{event_id}", 303)
        does = scheduling.pause if act == "pause" else scheduling.resume
        await does(connection, name, by=caller.name, why=why)
    return RedirectResponse("/schedules", 303)


async def _known(connection: Connection, name: str) -> Listed:
    found = await scheduling.look_up(connection, name)
    if found is None:
        raise HTTPException(404, f"There is no schedule {name}.")
    return found
