"""Events: finding them, and the story of one over all its consumers with its causes and effects."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.forms import OwnForm
from service.console.looks import ConsolePool
from service.console.permissions import Revealing, Viewer
from service.console.rendering import page
from service.ledger import causes, event_search, operations
from service.ledger.history import DeliveryStory, Step, Story, tell
from service.settings import Settings
from service.text import TRACEPARENT

if TYPE_CHECKING:
    from collections.abc import Iterator

router = APIRouter(prefix="/events")

SHOWN = 50

LOOKED_AT = 20_000
"""Deliveries looked at for one search."""

LOOKED_INTO = 100_000
"""The same where their payloads are looked into, by somebody who has said why."""

LOOKS_FOR = 2.0
"""Seconds of that, at most."""

DeliveryState = Literal["", "pending", "dispatched", "running", "completed", "dead"]


@router.get("")
async def list_events(
    request: Request,
    caller: Viewer,
    q: str = "",
    event_type: str = "",
    consumer: str = "",
    state: DeliveryState = "",
    until: str = "",
) -> Response:
    """The newest that match; an ID leads to its event at once."""
    looking: ConsolePool = request.app.state.looking
    q, end = q.strip(), _moment(until)
    async with looking() as connection:
        given = _uuid(q)
        if given is not None and await tell(connection, given, timedelta(), masked=True) is not None:
            return RedirectResponse(f"/events/{given}", 303)
        wanted = event_search.EventFilter(
            event_type or None, consumer or None, q or None, (state,) if state else None, until=end
        )
        found = await event_search.find(connection, wanted, SHOWN, LOOKED_AT)
        events = await event_search.load(connection, found.event_ids)
    return page(
        request,
        "events.html",
        q=q,
        event_type=event_type,
        consumer=consumer,
        state=state,
        until=until,
        states=event_search.STATES,
        found=found,
        events=events,
        older=_older(found, events),
    )


@router.post("/by-value")
async def list_events_by_value(request: Request, caller: Revealing, form: OwnForm) -> Response:
    """The newest with this value in their payload, which is looked into once that is on record.

    It is sent by a form, so that no address and no log has the value.
    """
    acting: ConsolePool = request.app.state.acting
    value, event_type, until, why = form["value"], form["event_type"], form["until"], form.why
    if not value:
        raise HTTPException(422, "Say which value.")
    wanted = event_search.EventFilter(event_type or None, until=_moment(until), value=value)
    about = {name: text for name, text in (("value", value), ("event_type", event_type), ("until", until)) if text}
    async with acting() as connection:
        await operations.record(connection, "search", about, by=caller.name, why=why)
        found = await event_search.find(connection, wanted, SHOWN, LOOKED_INTO, LOOKS_FOR)
        events = await event_search.load(connection, found.event_ids)
    return page(
        request,
        "events_by_value.html",
        value=value,
        event_type=event_type,
        until=until,
        why=why,
        found=found,
        events=events,
        older=_older(found, events),
    )


@router.get("/{given}")
async def show_event(request: Request, caller: Viewer, given: UUID) -> Response:
    """The story of the event with this ID, or of the delivery's."""
    looking: ConsolePool = request.app.state.looking
    settings: Settings = request.app.state.settings
    async with looking() as connection:
        story = await tell(connection, given, timedelta(seconds=settings.outbox.keep_completed), masked=True)
        if story is None:
            raise HTTPException(
                404, f"Nothing is known of {given}: it never committed, or it was completed and purged long ago."
            )
        family = await causes.family(connection, story.event_id, story.headers)
    return page(
        request,
        "event.html",
        story=story,
        family=family,
        steps=sorted(_steps(story), key=lambda step: step[0].at),
        trace=_trace(story, settings.console.trace_url),
        given=given,
    )


def _older(found: event_search.Found, events: list[event_search.ListedEvent]) -> str | None:
    """From where on older ones are to be looked for, if there may be any."""
    # Those that were found may be gone by now.
    at = events[-1].published_at if found.more and events else found.reached
    return None if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds")


def _steps(story: Story) -> Iterator[tuple[Step, DeliveryStory]]:
    for delivery in story.deliveries:
        for step in delivery.steps:
            if step.kind != "published":  # which they have in common
                yield step, delivery


def _trace(story: Story, url: str) -> tuple[str, str] | None:
    """The trace's ID, and where it is shown."""
    traceparent = story.headers.get("traceparent", "")
    if not TRACEPARENT.fullmatch(traceparent):
        return None
    trace = traceparent.split("-")[1]
    return trace, url.replace("{trace}", trace)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise HTTPException(422, "Until: expected a time, such as 2026-11-20T14:30") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
