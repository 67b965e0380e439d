"""`outbox events list | show`."""

from __future__ import annotations

import asyncio
import textwrap
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from relay.cli.command import CommandError, Exit, Json, ask, connect, parse_span
from relay.cli.event_text import event_as_json, story_as_json, story_lines, summary
from relay.cli.output import line, note, plain, print_json, screen_width
from service.ledger import event_search
from service.ledger.history import tell
from service.settings import load_settings

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.history import Story

app = typer.Typer(help="What became of events.", no_args_is_help=True, rich_markup_mode=None)

_STORIES = 20
"""Events of one correlation id that are told."""


@app.command("list")
def list_(
    event_type: Annotated[str | None, typer.Option("--type", help="Only of this type.")] = None,
    consumer: Annotated[str | None, typer.Option(help="Only with a delivery to this consumer.")] = None,
    state: Annotated[
        str | None, typer.Option(help=f"Only with a delivery that is {', '.join(event_search.STATES)}.")
    ] = None,
    value: Annotated[
        str | None, typer.Option(help="Only with this in its payload: all of a string or number, at any depth.")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Published since: 2h (ago), or an ISO time.")] = None,
    until: Annotated[str | None, typer.Option(help="Published before: 30m (ago), or an ISO time.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="At most this many.")] = 20,
    as_json: Json = False,
) -> None:
    """List events with their deliveries. The newest come first.

    It looks at the newest 100,000 deliveries before --until, and says so when there are more.
    """
    if state is not None and state not in event_search.STATES:
        raise CommandError(f"--state: {state!r} is not one of {', '.join(event_search.STATES)}")
    states = (state,) if state else event_search.STATES
    wanted = event_search.EventFilter(event_type, consumer, None, states, value=value)
    found, listed = ask(lambda connection: _list(connection, wanted, since, until, limit))
    if as_json:
        head = {"looked_at": found.looked_at, "complete": not (found.more or found.bounded)}
        print_json(head | {"events": [event_as_json(each) for each in listed]})
        return
    line(summary(listed) if listed else "No event matches.")
    if found.more:
        note(f"The newest {limit:,}; --limit or --until shows older ones.")
    if found.bounded:
        note(f"Looked at the newest {found.looked_at:,} deliveries; narrow with --until to see older ones.")


async def _list(
    connection: Connection, wanted: event_search.EventFilter, since: str | None, until: str | None, limit: int
) -> tuple[event_search.Found, list[event_search.ListedEvent]]:
    first, end = await parse_span(connection, since, until)
    found = await event_search.find(connection, replace(wanted, since=first, until=end), limit)
    return found, await event_search.load(connection, found.event_ids)


@app.command()
def show(
    reference: Annotated[
        str, typer.Argument(metavar="ID", help="An event's id, that of one of its deliveries, or a correlation id.")
    ],
    as_json: Json = False,
) -> None:
    """Tell an event's story. Who did what when, for each consumer, and what happens next.

    For a correlation id, the newest 20 events that carry it are told in the order they were published, as far as they
    are among the newest 100,000 deliveries; --json then prints a list, even of one.
    """
    stories, correlated = asyncio.run(_tell(reference))
    if as_json:
        print_json([*map(story_as_json, stories)] if correlated else story_as_json(stories[0]))
        return
    width = min(screen_width(), 120)
    for number, story in enumerate(stories):
        if number:
            line()
        for text, indent in story_lines(story):
            line(
                textwrap.fill(
                    plain(text), width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
                )
            )


async def _tell(reference: str) -> tuple[list[Story], bool]:
    """The stories, and whether they were found by their correlation id."""
    settings = load_settings()
    keep = timedelta(seconds=settings.outbox.keep_completed)
    async with connect(settings.database) as connection:
        story = await tell(connection, given, keep) if (given := _uuid(reference)) else None
        if story is not None:
            return [story], False
        found = await event_search.find(connection, event_search.EventFilter(correlation_id=reference), _STORIES)
        told = [await tell(connection, each, keep) for each in reversed(found.event_ids)]
    if found.more:
        note(f"Only the newest {_STORIES} events of this correlation id are told.")
    stories = [each for each in told if each is not None]
    if not stories:
        where = f"any of the newest {found.looked_at:,} deliveries" if found.bounded else "any other"
        raise CommandError(
            f"nothing is known of event {reference}: its transaction did not commit, nobody consumes it, or it was "
            f"completed and purged long ago; nor is it the correlation id of {where}",
            Exit.NOT_FOUND,
        )
    return stories, True


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
