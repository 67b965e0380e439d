"""Pausing queues and resuming them, and limiting how much of one runs."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import ConsoleForm, OwnForm
from service.console.looks import ConsolePool
from service.console.permissions import Acting
from service.console.rendering import page
from service.ledger import limiting, pausing
from service.ledger.limit_text import read_limit
from service.ledger.message import is_queue_name
from service.ledger.pausing import EVERY_QUEUE

router = APIRouter(prefix="/queues")

QueueAct = Literal["pause", "resume", "limit", "unlimit"]


@router.get("/{act}")
async def ask_about_queue(request: Request, caller: Acting, act: QueueAct, queue: str) -> Response:
    """What will happen, and why it should."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        paused = {each.queue: each for each in await pausing.paused_queues(connection)}
        limited = {each.queue: each for each in await limiting.limited_queues(connection)}
    return page(
        request,
        "queue.html",
        act=act,
        queue=_known(queue, act),
        every_queue=EVERY_QUEUE,
        paused=paused,
        limit=limited.get(queue),
    )


@router.post("/{act}")
async def change_queue(request: Request, caller: Acting, act: QueueAct, form: OwnForm) -> Response:
    """Do it; if somebody has paused, resumed or unlimited it meanwhile, it is so."""
    acting: ConsolePool = request.app.state.acting
    queue, why = _known(form["queue"], act), form.why
    async with acting() as connection:
        match act:
            case "pause":
                await pausing.pause(connection, queue, by=caller.name, why=why)
            case "resume":
                await pausing.resume(connection, queue, by=caller.name, why=why)
            case "limit":
                await limiting.limit(connection, queue, *_limit(form), by=caller.name, why=why)
            case "unlimit":
                await limiting.unlimit(connection, queue, by=caller.name, why=why)
    request.app.state.looks.counts.forget()
    return RedirectResponse("/", 303)


def _known(queue: str, act: QueueAct) -> str:
    if not is_queue_name(queue) and (queue != EVERY_QUEUE or act in ("limit", "unlimit")):
        raise HTTPException(422, "This is no queue's name.")
    return queue


def _limit(form: ConsoleForm) -> tuple[int | None, float | None, int | None]:
    if not (form["concurrency"] or form["rate"]):
        raise HTTPException(422, "Limit it to what? Say how many at once, at which rate, or both.")
    try:
        return read_limit(_count(form, "concurrency"), form["rate"] or None, _count(form, "burst"))
    except ValueError as error:
        raise HTTPException(422, f"{str(error).capitalize()}.") from None


def _count(form: ConsoleForm, name: str) -> int | None:
    if not form[name]:
        return None
    try:
        return int(form[name])
    except ValueError:
        raise ValueError(f"{name}: {form[name]!r} is no number") from None
