"""Rows of the ledger as workers and relays leave them, written behind everybody's back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from service.dev.postgres import psql
from service.ledger.ids import delivery_id, new_event_id

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["SECRET", "LedgerRows", "literal"]

SECRET = "who-the-payload-names"
"""Stands in every payload."""


class LedgerRows:
    """Writes them; a column's value is an SQL expression, and has the usual one if it is not given."""

    def __init__(self, url: str) -> None:
        self._url = url

    def sql(self, statement: str) -> str:
        return psql(self._url, statement)

    def dead_letters(self, count: int = 1, error: str = "550 no such user", **columns: str) -> list[UUID]:
        """Open dead letters, numbered from 1 in this order; their deliveries' IDs."""
        errors = [{"at": "2026-01-02T03:04:06+00:00", "attempt": 3, "type": "MailError", "message": error,
                   "traceback": "orders/consumers.py:30 send"}]  # fmt: skip
        usual = {
            "consumer": "'orders.send_confirmation'", "queue": "'email'", "attempts": "3", "dispatches": "4",
            "created_at": "'2026-01-02T03:04:05Z'", "errors": literal(errors), "reason": "'failed 3 times'",
        }  # fmt: skip
        return self._insert("dead_letter", "message_id", count, usual | columns)

    def messages(self, count: int = 1, event_id: UUID | None = None, number: int = 1, **columns: str) -> list[UUID]:
        """Deliveries; their IDs."""
        usual = {"consumer": "'orders.reserve_stock'", "queue": "'stock'"}
        return self._insert("outbox_message", "id", count, usual | columns, event_id, number)

    def schedule(self, name: str, tick: UUID | None = None, **columns: str) -> None:
        """One that fires each night, an hour from now; by default with its tick."""
        if tick is None:
            kind = {"event_type": "'outbox.tick'", "consumer": "'outbox.tick'", "queue": "'email'"}
            [tick] = self.messages(1, None, 1, due_at="now() + interval '1 hour'", **kind)
        usual = {
            "declared": "true", "event_type": "'report.due'", "version": "1", "payload": literal({"it": SECRET}),
            "cron": "'0 3 * * *'", "tz": "'Europe/Berlin'", "catch_up": "'latest'", "queue": "'email'",
            "next_at": "now() + interval '1 hour'", "tick_id": f"'{tick}'",
        }  # fmt: skip
        given = {"name": f"$${name}$$"} | usual | columns
        self.sql(f"INSERT INTO outbox_schedule ({', '.join(given)}) VALUES ({', '.join(given.values())})")

    def _insert(
        self, table: str, key: str, count: int, columns: dict[str, str], event_id: UUID | None = None, number: int = 1
    ) -> list[UUID]:
        given = {
            "event_type": "'order.placed'", "version": "1", "payload": literal({"order_id": SECRET}),
            "headers": literal({"correlation_id": "abc"}),
        } | columns  # fmt: skip
        ids = [delivery_id(event_id or new_event_id(), number) for _ in range(count)]
        array = "ARRAY[" + ", ".join(f"'{each}'" for each in ids) + "]::uuid[]"
        self.sql(
            f"INSERT INTO {table} ({key}, event_id, {', '.join(given)}) "
            f"SELECT id, (left(id::text, 34) || '00')::uuid, {', '.join(given.values())} "
            f"FROM unnest({array}) WITH ORDINALITY AS new (id, nth) ORDER BY nth"
        )
        return ids


def literal(value: Any) -> str:
    """The value as an SQL expression of type jsonb."""
    return "'" + json.dumps(value).replace("'", "''") + "'::jsonb"
