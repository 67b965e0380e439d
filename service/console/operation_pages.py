"""Replaying and discarding: one dead letter or many, what that would be, and how far it came."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import ConsoleForm, OwnForm
from service.console.looks import ConsolePool
from service.console.operation_runner import OperationRunner
from service.console.permissions import Acting, Viewer
from service.console.rendering import link, page
from service.database.driver import Connection
from service.ledger import dead_letters, letter_groups, operations
from service.ledger.dead_letters import LetterFilter
from service.ledger.replaying import refusals, resolve

router = APIRouter()

SHOWN = 100
FASTEST = 100_000.0

_FILTER = ("consumer", "event_type", "queue", "error")

LetterAct = Literal["replay", "discard"]


@router.get("/dead-letters/{act}/many")
async def preview_many(
    request: Request,
    caller: Acting,
    act: LetterAct,
    consumer: str = "",
    event_type: str = "",
    queue: str = "",
    error: str = "",
    group: str = "",
) -> Response:
    """Which ones are meant. Those that die from now on are not."""
    wanted = LetterFilter(consumer or None, event_type or None, queue or None, error=error or None)
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        now: datetime = await connection.fetchval("SELECT clock_timestamp()")
        wanted = replace(wanted, until=now)
        ids = await _ids(connection, wanted, group)
        kinds = await dead_letters.overview(connection, ids[: operations.MOST])
    return page(
        request,
        "many.html",
        act=act,
        total=min(len(ids), operations.MOST),
        more=len(ids) > operations.MOST,
        most=operations.MOST,
        kinds=kinds,
        meant={name: value for name, value in wanted.about.items() if name in _FILTER}
        | ({"group": group} if group else {}),
        until=now.isoformat(),
        back=link("/dead-letters", consumer=consumer, event_type=event_type, queue=queue, error=error, group=group),
    )


@router.post("/dead-letters/{act}/many")
async def begin_many(request: Request, caller: Acting, act: LetterAct, form: OwnForm) -> Response:
    """Begin an operation with those that were shown, as far as they are still open."""
    runner: OperationRunner = request.app.state.runner
    if runner.is_full:
        raise HTTPException(503, "This console carries out as many operations as it may. Wait for one to end.")
    consumer, event_type, queue, error = (form[name] or None for name in _FILTER)
    wanted = LetterFilter(consumer, event_type, queue, error=error, until=_until(form))
    why, rate, group = form.why, _rate(form), form["group"]
    acting: ConsolePool = request.app.state.acting
    async with acting() as connection:
        ids = (await _ids(connection, wanted, group))[: operations.MOST]
        if not ids:
            raise HTTPException(409, "None of them is open any more. Nothing was done.")
        about = wanted.about | ({"group": group} if group else {})
        number = await operations.plan(connection, act, ids, about=about, by=caller.name, why=why, rate=rate)
    await runner.begin(number, by=caller.name)
    return RedirectResponse(f"/operations/{number}", 303)


@router.post("/dead-letters/{number}/{act}")
async def resolve_one(request: Request, caller: Acting, number: int, act: LetterAct, form: OwnForm) -> Response:
    """Replay or discard one at once."""
    acting: ConsolePool = request.app.state.acting
    async with acting() as connection:
        headway = await resolve(connection, act, [number], by=caller.name, why=form.why)
        refused = await refusals(connection, headway.refused)
    if refused:
        return page(request, "refused.html", status=409, refused=refused)
    request.app.state.looks.counts.forget()
    return RedirectResponse(f"/dead-letters/{number}", 303)


@router.get("/operations")
async def list_operations(request: Request, caller: Viewer) -> Response:
    """Replays and discards, the latest first."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        found = await operations.latest(connection, SHOWN)
    return page(request, "operations.html", operations=found)


@router.get("/operations/{number}")
async def show_operation(request: Request, caller: Viewer, number: int) -> Response:
    """How far one came, and what was left alone."""
    looking: ConsolePool = request.app.state.looking
    async with looking() as connection:
        operation = await operations.load(connection, number)
        if operation is None:
            raise HTTPException(404, f"There is no operation {number}.")
        refused = await refusals(connection, operation.refused_ids)
    return page(request, "operation.html", operation=operation, refused=refused)


@router.post("/operations/{number}/stop")
async def stop_operation(request: Request, caller: Acting, number: int, form: OwnForm) -> Response:
    """Stop it before its next batch, wherever it runs."""
    acting: ConsolePool = request.app.state.acting
    async with acting() as connection:
        await operations.stop(connection, number, by=caller.name, why=form.why)
    return RedirectResponse(f"/operations/{number}", 303)


@router.post("/operations/{number}/resume")
async def resume_operation(request: Request, caller: Acting, number: int, form: OwnForm) -> Response:
    """Go on with what was stopped, or with what a process has left that is gone."""
    runner: OperationRunner = request.app.state.runner
    if runner.is_full:
        raise HTTPException(503, "This console carries out as many operations as it may. Wait for one to end.")
    if not await runner.begin(number, by=caller.name, why=form.why, rate=_rate(form)):
        raise HTTPException(409, "It is finished, or somebody else goes on with it.")
    return RedirectResponse(f"/operations/{number}", 303)


async def _ids(connection: Connection, wanted: LetterFilter, group: str) -> list[int]:
    if group:
        return await letter_groups.find_ids(connection, wanted, group)
    return await dead_letters.find_ids(connection, wanted, operations.MOST + 1)


def _rate(form: ConsoleForm) -> float | None:
    if not form["rate"]:
        return None
    try:
        rate = float(form["rate"])
    except ValueError:
        rate = 0
    if not 0.1 <= rate <= FASTEST:
        raise HTTPException(422, f"The rate is a number from 0.1 to {FASTEST:,.0f}, or nothing for as fast as it goes.")
    return rate


def _until(form: ConsoleForm) -> datetime:
    try:
        until = datetime.fromisoformat(form["until"])
    except ValueError:
        raise HTTPException(422, "The form is not whole: look at what is meant again.") from None
    # A form that was left open for long is of another day.
    if until.tzinfo is None or datetime.now(UTC) - until > timedelta(days=1):
        raise HTTPException(422, "That was too long ago: look at what is meant again.")
    return until
