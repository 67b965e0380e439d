"""The pictures in `docs/console.md`, made by `python -m tests.service.console.pictures` of a ledger that is made up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import SecretStr

from service.console.console_app import create_console
from service.console.operators import SECRET_HEADER
from service.database.driver import open_connection
from service.dev.places import scratch
from service.dev.postgres import Postgres
from service.ledger.ids import new_event_id
from service.settings import BrokerSettings, ConsoleSettings, DatabaseSettings, Settings
from tests.servers.real_servers import migrate
from tests.service.api.serving import serve
from tests.service.console.browsing import browsing
from tests.service.console.ledger_rows import LedgerRows, literal
from tests.service.docs.pages import DOCS

if TYPE_CHECKING:
    from uuid import UUID

__all__ = ["main"]

_FOLDER = DOCS / "console"
_PROXY_SECRET = "p" * 32

_HOUR = """
INSERT INTO outbox_minute
SELECT date_trunc('minute', now()) - ago * interval '1 minute', queue, consumer, 'completed',
       (pace * (1 + sin(ago / 9.0) / 3 + random() / 5))::int, 1, array_fill(0, ARRAY[16]), 1, array_fill(0, ARRAY[16]),
       1, ARRAY[20, 50, 30, 8, 4, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
FROM generate_series(0, 59) AS ago,
     (VALUES ('stock', 'orders.reserve_stock', 420), ('stock', 'orders.count_sales', 390),
             ('email', 'orders.send_confirmation', 240)) AS consumer (queue, consumer, pace)
UNION ALL
SELECT date_trunc('minute', now()) - ago * interval '1 minute', 'email', 'orders.send_confirmation', 'failed',
       (60 - ago * 4), 1, array_fill(0, ARRAY[16]), 1, array_fill(0, ARRAY[16]), 1, array_fill(0, ARRAY[16])
FROM generate_series(0, 14) AS ago
"""
_PROCESSES = """
INSERT INTO outbox_process (id, kind, host, pid, queues, threads, version, seen_at, running) VALUES
    (gen_random_uuid(), 'relay', 'one', 11, '{}', 0, '4c80f07', now(), 0),
    (gen_random_uuid(), 'worker', 'one', 12, '{stock}', 8, '4c80f07', now(), 5),
    (gen_random_uuid(), 'worker', 'two', 12, '{email}', 8, '4c80f07', now(), 2)
"""


def _fill(rows: LedgerRows) -> UUID:
    """Something of everything; the event whose story is told."""
    rows.sql(_HOUR)
    rows.sql(_PROCESSES)
    rows.sql("INSERT INTO paused_queue VALUES ('email', now() - interval '7 minutes', 'ann', 'mail server refuses us')")
    rows.messages(12, state="'running'", started_at="now()", attempts="1", dispatches="1")
    rows.messages(31, state="'dispatched'", dispatches="1")
    rows.messages(214, None, 1, consumer="'orders.send_confirmation'", queue="'email'")
    for number in range(17):
        rows.dead_letters(1, error=f"550 5.1.1 <customer{number}@example.com>: no such mailbox", died_at="now()")
    rows.dead_letters(6, error="451 4.7.1 try again in 300 s", died_at="now() - interval '20 minutes'")
    rows.dead_letters(2, error="no stock of product 17", consumer="'orders.reserve_stock'", queue="'stock'")
    _schedules_and_lanes(rows)
    return _story(rows)


def _schedules_and_lanes(rows: LedgerRows) -> None:
    rows.schedule("report.nightly", last_at="now() - interval '23 hours'")
    rows.schedule("stock.counted", cron="'0 9 * * MON'", paused_at="now() - interval '2 days'", paused_by="'ann'",
                  why="'stocktaking'")  # fmt: skip
    rows.schedule("prices.fetched", cron="NULL", every="interval '5 minutes'", tz="'UTC'", queue="'stock'",
                  next_at="now() + interval '3 minutes'", last_at="now() - interval '2 minutes'")  # fmt: skip
    [tick] = rows.dead_letters(1, consumer="'outbox.tick'", queue="'email'", event_type="'outbox.tick'")
    rows.schedule("reminder:0193c3f4-8a51", tick, declared="false", event_type="'review.reminder_due'",
                  next_at="now() - interval '7 hours'")  # fmt: skip
    rows.dead_letters(1, lane="'product:17'", position="1", blocks="true", died_at="now() - interval '40 minutes'",
                      reason="'failed 8 times'", consumer="'search.index'", queue="'search'")  # fmt: skip
    kind = {"due_at": "outbox_parked()", "consumer": "'search.index'", "queue": "'search'"}
    rows.messages(12, None, 1, lane="'product:17'", **kind)
    rows.messages(3, None, 1, lane="'product:4'", **kind)
    rows.sql(
        "INSERT INTO limited_queue (queue, concurrency, limited_by, why) VALUES ('search', 2, 'bob', 'a small host')"
    )


def _story(rows: LedgerRows) -> UUID:
    placed, confirmed = new_event_id(), new_event_id()
    headers = {
        "correlation_id": "checkout-8261",
        "traceparent": f"00-{'4bf92f3577b34da6a3ce929d0e0e4736'}-00f067aa0ba902b7-01",
    }
    done = {
        "state": "'completed'", "attempts": "1", "dispatches": "1", "created_at": "now() - interval '90 s'",
        "dispatched_at": "now() - interval '89.997 s'", "started_at": "now() - interval '89.995 s'",
        "completed_at": "now() - interval '89.98 s'", "headers": literal(headers),
    }  # fmt: skip
    [reserved] = rows.messages(1, placed, 1, **done)
    rows.messages(1, placed, 2, **done | {"consumer": "'orders.count_sales'"})
    caused = literal(headers | {"causation_id": str(reserved)})
    failed = [
        {"at": "{0}", "attempt": 1, "type": "MailDeferredError", "message": "451 4.7.1 try again in 300 s"},
        {"at": "{1}", "attempt": 2, "type": "MailDeferredError", "message": "451 4.7.1 try again in 300 s"},
    ]
    times = [rows.sql(f"SELECT to_json(now() - interval '{ago} s') #>> '{{}}'") for ago in (88, 70)]
    errors = literal(failed).replace("{0}", times[0]).replace("{1}", times[1])
    rows.messages(
        1, confirmed, 1, event_type="'order.confirmed'", consumer="'orders.send_confirmation'", queue="'email'",
        headers=caused, errors=errors, attempts="2", dispatches="2", created_at="now() - interval '89.98 s'",
        dispatched_at="now() - interval '71 s'", started_at="now() - interval '70.5 s'",
        due_at="now() + interval '40 s'",
    )  # fmt: skip
    return confirmed


async def _take(url: str, event: UUID) -> None:
    console = ConsoleSettings(proxy="127.0.0.1", secret=SecretStr(_PROXY_SECRET))
    broker = BrokerSettings(url=SecretStr("redis://127.0.0.1:1/0"))
    settings = Settings(database=DatabaseSettings(url=SecretStr(url)), broker=broker, console=console)
    headers = {SECRET_HEADER: _PROXY_SECRET, "X-Forwarded-User": "ann", "X-Forwarded-Groups": "operator, payload"}
    pages = {
        "overview": ("/", "light"),
        "dead-letters": ("/dead-letters", "dark"),
        "event": (f"/events/{event}", "light"),
        "schedules": ("/schedules", "dark"),
        "lanes": ("/lanes", "light"),
    }
    _FOLDER.mkdir(exist_ok=True)
    relay = await open_connection(settings.database, "outbox-relay")  # by which it is known
    async with serve(create_console(settings)) as client:
        for name, (path, scheme) in pages.items():
            size = {"width": 1240, "height": {"schedules": 600, "lanes": 420}.get(name, 760)}
            async with browsing(headers, color_scheme=scheme, viewport=size) as visit:
                await visit.page.goto(str(client.base_url).rstrip("/") + path)
                await visit.page.screenshot(path=_FOLDER / f"{name}.png")
    await relay.close()


def main() -> None:
    """Write the pictures."""
    with scratch() as folder, Postgres(folder / "postgres", durable=False) as postgres:
        url = postgres.ensure_database("service")
        migrate(url)
        event = _fill(LedgerRows(url))
        asyncio.run(_take(url, event))


if __name__ == "__main__":
    main()
