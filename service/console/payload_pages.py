"""Payloads: shown to who may see them and says why, and put right by who may act, too.

What must stay true: nobody sees one without a record of it, which is written in the transaction that reads it.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import OwnForm
from service.console.looks import ConsolePool
from service.console.permissions import Editing, Revealing
from service.console.rendering import page
from service.errors import OutboxError
from service.ledger import dead_letters, operations
from service.ledger.editing import Edited
from service.ledger.history import payload_of_event

if TYPE_CHECKING:
    from collections.abc import Mapping

router = APIRouter()


@router.post("/dead-letters/{number}/payload")
async def reveal_of_dead_letter(request: Request, caller: Revealing, number: int, form: OwnForm) -> Response:
    """A dead letter's payload, and a form to put it right."""
    acting: ConsolePool = request.app.state.acting
    why = form.why
    async with acting() as connection, connection.transaction():
        letter = await dead_letters.look_up(connection, number)
        if letter is None:
            raise HTTPException(404, f"There is no dead letter {number}.")
        await operations.record(connection, "reveal", {"dead_letter": number}, by=caller.name, why=why)
    payload, version, problem = letter["payload"], letter["version"], ""
    if caller.may("operator") and not letter["resolution"]:
        try:
            payload, version = (await asyncio.to_thread(_corrections)).as_read_now(letter)
        except OutboxError as error:
            problem = f"It cannot be put right here: {error}"
    return _editor(request, letter, _written(payload), why, version=version, problem=problem)


@router.post("/events/{given}/payload")
async def reveal_of_event(request: Request, caller: Revealing, given: UUID, form: OwnForm) -> Response:
    """An event's payload, which its deliveries share."""
    acting: ConsolePool = request.app.state.acting
    why = form.why
    async with acting() as connection, connection.transaction():
        payload = await payload_of_event(connection, given)
        if payload is None:
            raise HTTPException(404, f"Nothing is known of {given}.")
        await operations.record(connection, "reveal", {"event": str(given)}, by=caller.name, why=why)
    return page(request, "payload.html", title="an event", back=f"/events/{given}", payload=_written(payload))


@router.post("/dead-letters/{number}/edit")
async def edit(request: Request, caller: Editing, number: int, form: OwnForm) -> Response:
    """Replay it with this payload, which its consumer must be able to read; the dead letter keeps the original."""
    acting: ConsolePool = request.app.state.acting
    why, text = form.why, form["payload"]
    async with acting() as connection:
        letter = await dead_letters.look_up(connection, number)
        if letter is None:
            raise HTTPException(404, f"There is no dead letter {number}.")
        corrections = await asyncio.to_thread(_corrections)
        try:
            payload = corrections.read_payload(text)
            done = await corrections.edit(connection, number, payload, by=caller.name, why=why)
        except OutboxError as error:
            return _editor(request, letter, text, why, problem=f"Nothing was done: {error}", status=422)
    if not isinstance(done, Edited):
        return page(request, "refused.html", status=409, refused={number: done})
    return RedirectResponse(f"/events/{done.event_id}", 303)


def _corrections() -> Any:
    """What checks a payload, with the domains that it knows. Nothing else of the console needs them."""
    from service import domains
    from service.outbox import corrections

    domains.discover()
    return corrections


def _editor(
    request: Request,
    letter: Mapping[str, Any],
    text: str,
    why: str,
    *,
    version: int | None = None,
    problem: str = "",
    status: int = 200,
) -> Response:
    """The page with what is stored, or with what a person has made of it; `version` is that of what is shown."""
    shown = version or letter["version"]
    return page(
        request, "editor.html", status=status, letter=letter, payload=text, version=shown, why=why, problem=problem
    )


def _written(payload: Mapping[str, Any]) -> str:
    return json.dumps(payload, indent=2, ensure_ascii=False)
