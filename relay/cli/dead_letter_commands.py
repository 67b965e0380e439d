"""`outbox dead-letters list | show | replay | discard | edit`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import By, CommandError, Json, Why, ask, connect, parse_span, whoami
from relay.cli.dead_letter_text import cells, description, summary
from relay.cli.edit_command import edit
from relay.cli.output import line, note, print_json, print_json_list
from relay.cli.resolution import Order, carry_out, look_up
from service.ledger import dead_letters
from service.settings import load_settings

if TYPE_CHECKING:
    from service.ledger.replaying import Action

app = typer.Typer(
    help="See, replay, edit or discard what failed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Numbers or delivery ids.")]
_Consumer = Annotated[str | None, typer.Option(help="Only of this consumer.")]
_EventType = Annotated[str | None, typer.Option(help="Only of this event type.")]
_Queue = Annotated[str | None, typer.Option(help="Only of this queue.")]
_Since = Annotated[str | None, typer.Option(help="Died since: 2h (ago), or an ISO time (UTC unless it says so).")]
_Until = Annotated[str | None, typer.Option(help="Died before: 30m (ago), or an ISO time.")]
_Error = Annotated[str | None, typer.Option(help="Only with this text in the reason or an error, in any case.")]
_Everything = Annotated[bool, typer.Option("--all", help="All open dead letters.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
_Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before doing more than one.")]
_Rate = Annotated[float | None, typer.Option(min=0.1, max=100_000, help="At most this many per second.")]


@app.command("list")
def list_(
    consumer: _Consumer = None,
    event_type: _EventType = None,
    queue: _Queue = None,
    since: _Since = None,
    until: _Until = None,
    error: _Error = None,
    state: Annotated[str, typer.Option(help="open, replayed, discarded, edited or any.")] = "open",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most this many, the latest first.")] = 50,
    as_json: Json = False,
) -> None:
    """List dead letters. The latest come first."""
    if state not in dead_letters.STATES:
        raise CommandError(f"--state: {state!r} is not one of {', '.join(dead_letters.STATES)}")
    wanted = dead_letters.LetterFilter(consumer, event_type, queue, error=error, state=state)
    asyncio.run(_list(wanted, since, until, limit, as_json=as_json))


async def _list(
    wanted: dead_letters.LetterFilter, since: str | None, until: str | None, limit: int, *, as_json: bool
) -> None:
    async with connect(load_settings().database) as connection:
        first, end = await parse_span(connection, since, until)
        wanted = replace(wanted, since=first, until=end)
        total, ids = await dead_letters.find(connection, wanted, limit)
        rows = dead_letters.load(connection, ids)
        if as_json:
            await print_json_list({"total": total}, "dead_letters", rows)
            return
        resolved = wanted.state != "open"
        lines = [cells(row, resolved=resolved) async for row in rows]
    if not lines:
        line("There are no open dead letters." if wanted == dead_letters.LetterFilter() else "No dead letter matches.")
        return
    line(summary(lines, resolved=resolved))
    if total > len(lines):
        note(f"The latest {len(lines):,} of {total:,}; --limit shows more.")


@app.command()
def show(
    dead_letter: Annotated[str, typer.Argument(metavar="ID", help="A number or a delivery id.")], as_json: Json = False
) -> None:
    """Show one. What it was, every error that is kept, and how to replay it."""
    row = ask(lambda connection: look_up(connection, dead_letter))
    if as_json:
        print_json(row | {"replay": f"outbox dead-letters replay {row['id']}"})
    else:
        line("\n".join(description(row)))


def _resolving(action: Action, does: str) -> None:
    """Add the command for one of the two things that can be done with dead letters."""

    @app.command(action, help=does)
    def command(
        ids: _Ids = None,
        consumer: _Consumer = None,
        event_type: _EventType = None,
        queue: _Queue = None,
        since: _Since = None,
        until: _Until = None,
        error: _Error = None,
        everything: _Everything = False,
        dry_run: _DryRun = False,
        yes: _Yes = False,
        rate: _Rate = None,
        by: By = None,
        why: Why = None,
        as_json: Json = False,
    ) -> int:
        wanted = dead_letters.LetterFilter(consumer, event_type, queue, error=error)
        return carry_out(
            Order(action, ids or [], wanted, since, until, everything, dry_run, yes, rate, by or whoami(), why, as_json)
        )


_resolving(
    "replay",
    """Hand them over again. Under the same id, with a fresh budget of attempts.

    Takes ids or filters. The dead letter stays as the record of who replayed it, when and why.
    """,
)
_resolving(
    "discard",
    """Close them without effect. They are not handed over again.

    Takes ids or filters. The dead letter stays as the record of who discarded it, when and why.
    """,
)
app.command()(edit)
