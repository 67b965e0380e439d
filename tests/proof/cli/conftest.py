"""The `outbox` command on a database of the test's own, and rows to show it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from relay.cli.app import main
from service.dev.postgres import psql
from service.ledger.ids import delivery_id, new_event_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from uuid import UUID

COMMAND = [sys.executable, "-c", "from relay.cli.app import main; main()"]
"""`outbox` as a process of its own."""


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Outbox(Protocol):
    """Runs `outbox` with these arguments, and `answer` typed in."""

    def __call__(self, *arguments: str, answer: str = "") -> Ran: ...


@pytest.fixture
def outbox(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outbox:
    """The command, run in this process on a terminal of 80 columns."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, answer: str = "") -> Ran:
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        written = capsys.readouterr()
        return Ran(int(ended.value.code or 0), written.out, written.err)

    return run


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[[Sequence[str]], subprocess.Popen[str]]]:
    """The command as a process of its own."""
    with ExitStack() as stack:

        def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [*COMMAND, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


class Rows:
    """Writes and reads rows, behind everybody's back."""

    def __init__(self, url: str) -> None:
        self._url = url

    def sql(self, statement: str) -> str:
        return psql(self._url, statement)

    def dead_letter(self, count: int = 1, **columns: str) -> list[UUID]:
        """Insert open dead letters, numbered from 1 in this order; their deliveries' ids.

        Args:
            count: How many.
            columns: SQL expressions that differ from the usual ones.
        """
        ids = [delivery_id(new_event_id(), 1) for _ in range(count)]
        given = {
            "event_type": "'order.confirmed'",
            "version": "1",
            "consumer": "'orders.send_confirmation'",
            "queue": "'email'",
            "payload": """'{"order_id": "0193"}'""",
            "headers": """'{"correlation_id": "abc"}'""",
            "attempts": "3",
            "dispatches": "4",
            "created_at": "'2026-01-02T03:04:05Z'",
            "errors": json_literal([error("MailError", "550 no such user")]),
            "reason": "'failed 3 times'",
        } | columns
        self.sql(
            f"INSERT INTO dead_letter (message_id, event_id, {', '.join(given)}) "
            f"SELECT id, (left(id::text, 34) || '00')::uuid, {', '.join(given.values())} "
            f"FROM unnest({uuids(ids)}) WITH ORDINALITY AS new (id, number) ORDER BY number"
        )
        return ids

    def message(self, count: int = 1, number: int = 1, event_id: UUID | None = None, **columns: str) -> list[UUID]:
        """Insert outbox rows; their ids."""
        ids = [delivery_id(event_id or new_event_id(), number) for _ in range(count)]
        given = {
            "event_type": "'order.placed'",
            "version": "1",
            "consumer": "'orders.reserve_stock'",
            "queue": "'stock'",
            "payload": """'{"order_id": "0193"}'""",
            "headers": """'{"correlation_id": "abc"}'""",
            "completed_at": "now()" if columns.get("state") == "'completed'" else "NULL",
        } | columns
        self.sql(
            f"INSERT INTO outbox_message (id, event_id, {', '.join(given)}) "
            f"SELECT id, (left(id::text, 34) || '00')::uuid, {', '.join(given.values())} "
            f"FROM unnest({uuids(ids)}) AS new (id)"
        )
        return ids


@pytest.fixture
def rows(database_url: str) -> Rows:
    """Rows in this test's database."""
    return Rows(database_url)


def uuids(ids: list[UUID]) -> str:
    return "ARRAY[" + ", ".join(f"'{each}'" for each in ids) + "]::uuid[]"


def error(type_: str, message: str, *, attempt: int = 1, at: str = "2026-01-02T03:04:06+00:00") -> dict[str, Any]:
    """An error as the worker stores it."""
    return {"at": at, "attempt": attempt, "type": type_, "message": message, "traceback": "orders/consumers.py:30 send"}


def json_literal(value: Any) -> str:
    return "'" + json.dumps(value).replace("'", "''") + "'::jsonb"
