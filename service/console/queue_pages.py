"""Pausing queues and resuming them."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import OwnForm
from service.console.looks import ConsolePool
from service.console.permissions import Acting
from service.console.rendering import page
from service.ledger import pausing
from service.ledger.message import is_queue_name
from service.ledger.pausing import EVERY_QUEUE

router = APIRouter(prefix="/queues")

QueueAct = Literal["pause", "resume"]


@router.get("/{act}")
async def ask_about_queue(request: Request, caller: Acting, act: QueueAct, queue: str) -> Response:
    """What will happen, and why it should."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        paused = {each.queue: each for each in await pausing.paused_queues(connection)}
    return page(request, "queue.html", act=act, queue=_known(queue), every_queue=EVERY_QUEUE, paused=paused)


@router.post("/{act}")
async def change_queue(request: Request, caller: Acting, act: QueueAct, form: OwnForm) -> Response:
    """Pause it or resume it; if somebody has done so meanwhile, it is so."""
    acting: ConsolePool = request.app.state.acting
    does = pausing.pause if act == "pause" else pausing.resume
    async with acting() as connection:
        await does(connection, _known(form["queue"]), by=caller.name, why=form.why)
    request.app.state.looks.counts.forget()
    return RedirectResponse("/", 303)


def _known(queue: str) -> str:
    if queue != EVERY_QUEUE and not is_queue_name(queue):
        raise HTTPException(422, "This is no queue's name.")
    return queue
