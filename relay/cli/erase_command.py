"""`outbox erase`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import CommandError, Exit, ask, whoami
from relay.cli.output import line, note, print_json
from service.ledger import erasing

if TYPE_CHECKING:
    from service.database.driver import Connection
    from service.ledger.erasing import Erased

SHORTEST = 6
"""Characters of a value: a shorter one would be found in what has nothing to do with it."""

_OWNER = (
    "erasing takes the role that owns the tables, which migrations run as: set DATABASE__URL to it for this command"
)
_RIGHT = """
SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = 'outbox_erasure'::regclass
"""


def erase(
    values: Annotated[
        list[str], typer.Argument(metavar="VALUE...", help="Ids, an e-mail address: what names somebody.")
    ],
    why: Annotated[str, typer.Option(help="Why, for the record; without the values themselves.")],
    by: Annotated[str | None, typer.Option(help="Who does it, for the record; by default your user and host.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be erased, and do nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Erase what is stored of somebody. Payloads, errors and responses that hold a value; ids and times stay.

    Open deliveries are left alone: run it again when they are completed. Open dead
    letters are discarded. It takes the role that owns the tables, and looks at
    every row. The domains' own tables are yours to erase.
    """
    for value in values:
        if len(value.strip()) < SHORTEST:
            raise CommandError(f"{value!r} is too short: a value has {SHORTEST} characters at least")
        if value.strip().lower() in why.lower():
            raise CommandError("--why would keep what is to be erased: say it without the value")
    found = ask(lambda connection: _find(connection, values))
    if dry_run:
        return _report(found, as_json=as_json, done=False)
    if not _number(found):
        return _report(found, as_json=as_json, done=True)
    if not yes and not _confirmed(found):
        note("Nothing was done.")
        return Exit.FAILED
    erased = ask(lambda connection: erasing.erase(connection, values, by=by or whoami(), why=why))
    # What was open at the first look may have ended since, and what was dead may have been replayed.
    left = ask(lambda connection: erasing.find(connection, values))
    return _report(erased, as_json=as_json, done=True, left=left)


async def _find(connection: Connection, values: list[str]) -> Erased:
    if not await connection.fetchval(_RIGHT):
        raise CommandError(_OWNER, Exit.FAILED)
    return await erasing.find(connection, values)


def _confirmed(found: Erased) -> bool:
    note(_counted(found))
    sys.stderr.write("Erase what they say, for good? [y/N] ")
    sys.stderr.flush()
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        note("\nNobody answered; --yes does it without asking.")
    return answer.strip().lower() in ("y", "yes")


def _report(counts: Erased, *, as_json: bool, done: bool, left: Erased | None = None) -> int:
    remaining = left or counts
    still = remaining.open + (_number(left) if left else 0)
    if as_json:
        print_json({"dry_run": not done} | asdict(counts) | {"open": remaining.open, "left": still})
    else:
        line(f"Erased: {_counted(counts)}." if done else f"Would be erased: {_counted(counts)}; nothing was done.")
        if still:
            note(f"{still:,} are open or were stored meanwhile: run it again when they are completed.")
    return Exit.FAILED if done and still else Exit.OK


def _number(counts: Erased) -> int:
    return counts.deliveries + counts.dead_letters + counts.responses + counts.operations


def _counted(counts: Erased) -> str:
    text = f"{counts.deliveries:,} deliveries, {counts.dead_letters:,} dead letters, {counts.responses:,} responses"
    return text + (f", {counts.operations:,} operations" if counts.operations else "")
