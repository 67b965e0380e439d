"""The `outbox` command."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import typer
from typer.exceptions import TyperException

from relay.cli import (
    dead_letter_commands,
    event_commands,
    lane_commands,
    operation_commands,
    queue_commands,
    schedule_commands,
)
from relay.cli.command import CommandError, Exit
from relay.cli.doctor.doctor_command import doctor
from relay.cli.erase_command import erase
from relay.cli.output import ReaderGoneError, error, note
from relay.cli.purge_command import purge
from relay.cli.status_command import status
from service.errors import ConfigurationError
from service.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="outbox",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Run the relay, and look after what goes through the outbox.

    \b
    Exit codes:
      0    done
      1    refused or declined; --fail-if is true; the doctor found a problem
      2    wrong usage, or a setting is missing or wrong
      3    PostgreSQL or the broker is down, or the database is not migrated
      4    what was named is not there, or was dealt with already
      130  interrupted
    """,
)


@app.command()
def relay() -> int:
    """Run the relay. It hands over whatever is due, until SIGTERM or Ctrl-C."""
    # Few other commands need its brokers' clients.
    from relay.process.loop import run

    return asyncio.run(run(load_settings()))


app.command()(status)
app.add_typer(dead_letter_commands.app, name="dead-letters")
app.add_typer(operation_commands.app, name="operations")
app.add_typer(event_commands.app, name="events")
app.add_typer(queue_commands.app, name="queues")
app.add_typer(lane_commands.app, name="lanes")
app.add_typer(schedule_commands.app, name="schedules")
app.command("audit")(operation_commands.show_audit)
app.command()(purge)
app.command()(erase)
app.command()(doctor)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: every problem is one line on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(args=list(arguments), prog_name="outbox", standalone_mode=False)
        return int(code or Exit.OK)
    except CommandError as problem:
        error(str(problem))
        return problem.code
    except ConfigurationError as problem:
        error(str(problem))
        return Exit.USAGE
    except TyperException as problem:
        return _usage(problem)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except ReaderGoneError:
        return Exit.OK


def _usage(problem: TyperException) -> int:
    message = problem.format_message()
    if message.startswith("Usage:"):  # a group without a command: its help is the message
        note(message)
    else:
        context = getattr(problem, "ctx", None)
        error(f"{message.rstrip('.')}: see `{context.command_path if context else 'outbox'} --help`")
    return Exit.USAGE
