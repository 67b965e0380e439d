"""`outbox dead-letters edit`: what was wrong with a payload is put right, in an editor or on the command line.

This one command knows the domains: whether a consumer could read a payload, only the class of its event says. They are
loaded when it runs, and by no other command.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relay.cli.command import By, CommandError, Exit, Json, Why, ask, whoami
from relay.cli.operation_text import reason
from relay.cli.output import line, note, plain, print_json
from relay.cli.resolution import look_up
from service.errors import OutboxError
from service.ledger.editing import Edited
from service.ledger.replaying import Resolved, StaysOpen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from service.database.driver import Connection
    from service.ledger.replaying import Refusal
    from service.outbox.corrections import Correction


def edit(
    dead_letter: Annotated[str, typer.Argument(metavar="ID", help="A number or a delivery id.")],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field; JSON where it is JSON, else text. Repeatable."),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--payload-file", metavar="FILE", help="The whole payload as JSON; - is stdin.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check it, and do nothing.")] = False,
    by: By = None,
    why: Why = None,
    as_json: Json = False,
) -> int:
    """Replay one with another payload. Checked against its event's class.

    Without --set or --payload-file, $VISUAL or $EDITOR opens with the payload. What is
    corrected becomes a delivery with an id of its own, for the same consumer; the
    dead letter keeps the original, and who edited it, when and why.
    """
    letter = ask(lambda connection: look_up(connection, dead_letter))
    if letter["resolution"] is not None:
        was = Resolved(letter["resolution"], letter["resolved_by"], letter["resolved_at"])
        raise CommandError(reason(letter["id"], was), Exit.NOT_FOUND)
    payload, correction = _corrected(letter, assignments or [], file)
    if dry_run:
        return _say(letter, correction, None, as_json=as_json)
    done = ask(lambda connection: _edit(connection, letter["id"], payload, by or whoami(), why))
    if not isinstance(done, Edited):
        raise CommandError(reason(letter["id"], done), Exit.FAILED if isinstance(done, StaysOpen) else Exit.NOT_FOUND)
    return _say(letter, correction, done, as_json=as_json)


async def _edit(
    connection: Connection, number: int, payload: Mapping[str, Any], by: str, why: str | None
) -> Edited | Refusal:
    from service.outbox import corrections

    try:
        return await corrections.edit(connection, number, payload, by=by, why=why)
    except OutboxError as error:
        raise CommandError(str(error), Exit.FAILED) from None


def _corrected(
    letter: Mapping[str, Any], assignments: Sequence[str], file: str | None
) -> tuple[dict[str, Any], Correction]:
    if assignments and file is not None:
        raise CommandError("give either --set or --payload-file, not both")
    if assignments:
        payload = _as_read_now(letter) | dict(map(_assigned, assignments))
    elif file is not None:
        payload = _parsed(_read(file))
    else:
        return _asked_in_editor(letter)
    return payload, _check(letter, payload)


def _as_read_now(letter: Mapping[str, Any]) -> dict[str, Any]:
    from service import domains
    from service.outbox import corrections

    domains.discover()
    try:
        payload, _ = corrections.as_read_now(letter)
    except OutboxError as error:
        raise CommandError(str(error), Exit.FAILED) from None
    return payload


def _check(letter: Mapping[str, Any], payload: dict[str, Any]) -> Correction:
    from service import domains
    from service.outbox import corrections

    domains.discover()
    try:
        return corrections.correct(letter, payload)
    except OutboxError as error:
        raise CommandError(str(error), Exit.FAILED) from None


def _parsed(text: str) -> dict[str, Any]:
    from service.outbox import corrections

    try:
        return corrections.read_payload(text)
    except OutboxError as error:
        raise CommandError(str(error)) from None


def _assigned(assignment: str) -> tuple[str, Any]:
    field, equals, value = assignment.partition("=")
    if not equals or not field:
        raise CommandError(f"--set: {assignment!r} is no FIELD=VALUE")
    try:
        return field, json.loads(value)
    except ValueError:
        return field, value


def _read(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--payload-file: cannot read {file}: {error}") from None


def _asked_in_editor(letter: Mapping[str, Any]) -> tuple[dict[str, Any], Correction]:
    """Open it as often as it takes, so that nothing has to be typed twice."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise CommandError("set $EDITOR, or give --set FIELD=VALUE or --payload-file FILE")
    original = json.dumps(_as_read_now(letter), indent=2, ensure_ascii=False) + "\n"
    # Nobody else may read it.
    with tempfile.TemporaryDirectory(prefix="outbox-") as folder:
        path = Path(folder) / f"dead-letter-{letter['id']}.json"
        path.write_text(original, encoding="utf-8")
        while True:
            try:
                code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode  # noqa: S603
            except (OSError, ValueError) as error:
                raise CommandError(f"cannot run the editor {editor!r}: {error}") from None
            text = path.read_text(encoding="utf-8")
            if code or text == original:
                raise CommandError("nothing was changed, so nothing was done", Exit.FAILED)
            try:
                payload = _parsed(text)
                return payload, _check(letter, payload)
            except CommandError as problem:
                note(plain(str(problem)))
                sys.stderr.write("Edit it again? [Y/n] ")
                sys.stderr.flush()
                answer = sys.stdin.readline()
                if not answer.endswith("\n") or answer.strip().lower() in ("n", "no"):
                    raise


def _say(letter: Mapping[str, Any], correction: Correction, done: Edited | None, *, as_json: bool) -> int:
    number, fields = letter["id"], ", ".join(correction.fields)
    if as_json:
        print_json(
            {"dead_letter": number, "dry_run": done is None, "fields": correction.fields, "payload": correction.payload}
            | ({"message_id": done.delivery_id, "operation": done.operation} if done else {})
        )
    elif done is None:
        line(f"Dead letter {number} would be replayed with another {plain(fields)}; nothing was done.")
    else:
        line(f"Replayed dead letter {number} with another {plain(fields)}, as delivery {done.delivery_id}.")
    return Exit.OK
