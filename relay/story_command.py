"""`outbox events show`."""

from __future__ import annotations

import asyncio
import json
import textwrap
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from relay.console import connect, parse_uuid
from relay.output import line, plain, print_json, screen_width, timestamp
from relay.story import Delivery, Story, tell
from service.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

__all__ = ["app"]

app = typer.Typer(help="What became of an event.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def events() -> None:
    """Keep `show` a command of its own while it is the only one."""


@app.command()
def show(
    event: Annotated[str, typer.Argument(metavar="EVENT_ID", help="An event's id, or that of one of its messages.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell an event's story. Who did what when, for each consumer, and what happens next."""
    story = asyncio.run(_tell(parse_uuid(event)))
    if as_json:
        print_json(asdict(story))
        return
    width = min(screen_width(), 120)
    for text, indent in _lines(story):
        line(
            textwrap.fill(plain(text), width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        )


async def _tell(given: UUID) -> Story:
    settings = load_settings()
    async with connect(settings.database) as connection:
        return await tell(connection, given, timedelta(seconds=settings.outbox.keep_completed))


def _lines(story: Story) -> Iterator[tuple[str, str]]:
    """Each line with the indent of what does not fit on it."""
    yield f"Event {story.event_id}", ""
    yield f"{story.event_type}, version {story.version}, published {timestamp(story.published_at)}", "  "
    yield f"payload: {json.dumps(story.payload, ensure_ascii=False)}", "  "
    for name, value in sorted(story.headers.items()):
        yield f"{name.replace('_', ' ')}: {value}", "  "
    for delivery in story.deliveries:
        yield "", ""
        yield from _part(delivery)


def _part(delivery: Delivery) -> Iterator[tuple[str, str]]:
    yield f"{delivery.consumer}, queue {delivery.queue}: {delivery.state.upper()}", ""
    yield f"  message {delivery.message_id}", ""
    for step in delivery.steps:
        yield f"  {timestamp(step.at)}  {step.what}", " " * 24
    yield f"  What is next: {delivery.next}", " " * 16
