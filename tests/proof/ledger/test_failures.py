"""What is stored and logged of a failure tells what went wrong, and not on which values."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.outbox.running.failures import describe, trace

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

    from service.outbox.running.runner import Runner
    from tests.proof.ledger.conftest import Ledger


@pytest.mark.parametrize(
    ("payload", "message", "stored"),
    [
        ({"number": 4711}, "no account 4711.", "no account [payload]."),
        ({"number": 471}, "471 is taken, 4711 and 3.471 are not", "[payload] is taken, 4711 and 3.471 are not"),
        ({"price": 19.95}, "19.95 is over 119.95 and 19.955", "[payload] is over 119.95 and 19.955"),
        ({"price": "1999.50"}, "1999.50 exceeds 1999", "[payload] exceeds 1999"),
        ({"currency": "EUR"}, "EUR is not a currency of EUROPE", "[payload] is not a currency of EUROPE"),
        ({"quantity": 2, "gift": True, "size": "M"}, "2 of 3 left, True, M", "2 of 3 left, True, M"),
        ({"name": "Ada Lovelace", "first": "Ada"}, "Ada Lovelace", "[payload]"),
        ({"email": "Ada@Example.com"}, "no mailbox ada@EXAMPLE.com", "no mailbox [payload]"),
    ],
)
def test_values_of_the_payload_are_not_stored(payload: dict[str, Any], message: str, stored: str) -> None:
    assert describe(RuntimeError(message), payload)["message"] == stored
    assert trace(RuntimeError(message), payload) == f"RuntimeError: {stored}"


async def test_values_of_a_row_are_not_logged(ledger: Ledger, engine: AsyncEngine) -> None:
    await ledger.connection.execute("CREATE TABLE person (email text UNIQUE)")
    email = "\n".join(["ada", "lovelace"])
    with pytest.raises(DBAPIError) as raised:
        async with engine.begin() as connection:
            for _ in range(2):
                await connection.execute(text("INSERT INTO person VALUES (:email)"), {"email": email})
    logged = trace(raised.value, {})
    assert "duplicate key value violates unique constraint" in logged
    assert "INSERT INTO person" in logged
    assert "test_failures.py" in logged
    assert "ada\nlovelace" not in logged
    assert "Key (email)" not in logged


async def test_a_failed_run_is_logged_without_values(
    ledger: Ledger, runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    message_id = await ledger.happen("fail")
    await runner.deliver(message_id)
    row = await ledger.row(message_id)
    assert row is not None
    logged = capsys.readouterr().out
    assert "cannot handle [payload]" in logged
    assert json.loads(row["payload"])["subject_id"] not in logged
