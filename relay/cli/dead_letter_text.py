"""How dead letters look on a terminal."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from relay.cli.output import Column, age, cut, plain, screen_width, table, timestamp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def cause(row: dict[str, Any]) -> str:
    """Why it died, with the last error where the reason does not say it."""
    last = row["errors"][-1] if row["errors"] else {}
    text = f"{last.get('type', '')}: {last.get('message', '')}"
    return row["reason"] if not last or str(last.get("message")) in row["reason"] else f"{row['reason']}; {text}"


def cells(row: dict[str, Any], *, resolved: bool) -> list[str]:
    """One line of the summary, no wider than can be seen: there may be a hundred thousand."""
    texts = [
        str(row["id"]),
        age(row["age"]),
        row["consumer"],
        str(row["attempts"]),
        *([row["resolution"] or "open"] if resolved else []),
        cause(row),
    ]
    return [cut(plain(text), screen_width()) for text in texts]


def summary(lines: Sequence[Sequence[str]], *, resolved: bool) -> str:
    """One line for each."""
    columns = [
        Column("ID", right=True),
        Column("DIED", right=True),
        Column("CONSUMER", least=20),
        Column("TRIES", right=True),
        *([Column("STATE")] if resolved else []),
        Column("REASON", least=16),
    ]
    return table(columns, lines)


def description(row: dict[str, Any]) -> Iterator[str]:
    """Everything that is known of one, and what can be done about it."""
    yield f"Dead letter {row['id']}: {plain(cause(row))}"
    yield ""
    fields = {
        "consumer": f"{row['consumer']} (queue {row['queue']})",
        "event": f"{row['event_type']}, version {row['version']}",
        "event id": row["event_id"],
        "delivery id": row["message_id"],
        "published": timestamp(row["created_at"]),
        "died": f"{timestamp(row['died_at'])} ({age(row['age'])} ago)",
        "tried": f"{row['attempts']} attempts, handed to the broker {row['dispatches']} times",
        **({"lane": _lane(row)} if row["lane"] else {}),
        "payload": json.dumps(row["payload"], ensure_ascii=False),
        **{key.replace("_", " "): value for key, value in sorted(row["headers"].items())},
    }
    width = max(map(len, fields))
    for name, value in fields.items():
        yield f"  {name:{width}}  {plain(str(value))}"
    yield ""
    yield from _errors(row["errors"])
    yield ""
    yield from _resolution(row)


def _lane(row: dict[str, Any]) -> str:
    if not row["blocks"] or row["resolution"] is not None:
        return str(row["lane"])
    return f"{row['lane']} stands, and {row['held']:,} wait in it until this is replayed or discarded"


def _errors(errors: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Errors, the first and the latest are kept:" if errors else "No errors are recorded."
    for error in errors:
        yield plain(f"  attempt {error.get('attempt', '?')} at {error.get('at', '?')}")
        yield f"    {plain(str(error.get('type', 'error')))}: {plain(str(error.get('message', '')))}"
        for position in str(error.get("traceback") or "").splitlines():
            yield f"      {plain(position)}"


def _resolution(row: dict[str, Any]) -> Iterator[str]:
    if row["resolution"] is None:
        yield "To hand it over again, once its cause is repaired:"
        yield f"  outbox dead-letters replay {row['id']}"
    else:
        why = f": {plain(row['resolved_why'])}" if row["resolved_why"] else ""
        role = f" (database role {row['resolved_role']})" if row["resolved_role"] else ""
        who = f"{row['resolved_by']}{role}"
        yield f"It was {row['resolution']} by {plain(who)} at {timestamp(row['resolved_at'])}{why}"
    yield "What happened to the event:"
    yield f"  outbox events show {row['event_id']}"
