"""Dead letters: what went wrong in groups, the latest of them, and one with all that is known of it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response

from service.console.ledger_looks import LedgerLooks
from service.console.looks import ConsolePool
from service.console.permissions import Viewer
from service.console.rendering import page
from service.ledger import letter_groups
from service.ledger.dead_letters import MASKED, STATES, LetterFilter, load, look_up

router = APIRouter(prefix="/dead-letters")

SHOWN = 50

LetterState = Literal["open", "replayed", "discarded", "edited", "any"]


@router.get("")
async def list_dead_letters(
    request: Request,
    caller: Viewer,
    consumer: str = "",
    event_type: str = "",
    queue: str = "",
    error: str = "",
    group: str = "",
    state: LetterState = "open",
) -> Response:
    """Those that match, in groups and one by one."""
    wanted = LetterFilter(consumer or None, event_type or None, queue or None, error=error or None, state=state)
    looks: LedgerLooks = request.app.state.looks
    looking: ConsolePool = request.app.state.looking
    groups = await looks.groups.get(wanted)
    async with looking() as connection:
        found = await letter_groups.latest(connection, wanted, SHOWN, group or None)
        letters = [each async for each in load(connection, found.ids, MASKED)]
    return page(
        request,
        "dead_letters.html",
        wanted=wanted,
        group=group,
        states=STATES,
        groups=groups,
        found=found,
        letters=letters,
        bound=letter_groups.BOUND,
    )


@router.get("/{number}")
async def show_dead_letter(request: Request, caller: Viewer, number: int) -> Response:
    """One, without its payload."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        letter = await look_up(connection, number, MASKED)
    if letter is None:
        raise HTTPException(404, f"There is no dead letter {number}.")
    return page(request, "dead_letter.html", letter=letter)
