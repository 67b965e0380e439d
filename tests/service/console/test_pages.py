"""What the pages show."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote_plus

import pytest
from pydantic import SecretStr

from service.ledger.ids import new_event_id
from service.ledger.letter_groups import BOUND
from service.settings import DatabaseSettings
from tests.service.api.serving import serve
from tests.service.console.ledger_rows import SECRET, literal

if TYPE_CHECKING:
    import httpx

    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows


async def shown(client: httpx.AsyncClient, path: str, status: int = 200) -> str:
    """A page's text without its tags, on one line; what it names by attributes too."""
    answer = await client.get(path)
    assert answer.status_code == status, answer.text
    assert SECRET not in answer.text
    assert answer.text.startswith("<!doctype html>")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", answer.text))


async def test_an_empty_ledger_is_shown_as_such(console: httpx.AsyncClient) -> None:
    assert "Nothing is open" in await shown(console, "/")
    assert "No dead letter matches" in await shown(console, "/dead-letters")
    assert "No event matches" in await shown(console, "/events")
    assert "None has reported" in await shown(console, "/processes")
    assert "There is no schedule." in await shown(console, "/schedules")
    assert "Nothing waits in a lane" in await shown(console, "/lanes")


async def test_the_overview_counts_by_queue_and_consumer(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.messages(3)
    rows.messages(2, state="'dispatched'", dispatches="4")
    rows.messages(1, errors=literal([{"type": "E", "message": "x"}]))
    rows.dead_letters(2)
    rows.sql("INSERT INTO paused_queue VALUES ('email', now() - interval '3 hours', 'ann', 'mail server is down')")
    rows.sql(
        "INSERT INTO outbox_minute VALUES (date_trunc('minute', now() - interval '1 minute'), 'stock', "
        "'orders.reserve_stock', 'completed', 250, 1, array_fill(0, ARRAY[16]), 1, array_fill(0, ARRAY[16]), 1, "
        "'{0,250,0,0,0,0,0,0,0,0,0,0,0,0,0,0}')"
    )
    page = await shown(console, "/")
    assert "orders.reserve_stock 4 2 2 not taken 0 1 0" in page
    assert "50 10 ms" in page  # a minute, and the 99th percentile
    assert "orders.send_confirmation 0 0 0 0 2" in page
    assert "email paused for 3 h by ann: mail server is down" in page
    assert "stock no worker takes from it" in page


async def test_a_limit_is_shown_at_its_queue_and_in_the_story_of_what_it_may_hold_up(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    rows.sql(
        "INSERT INTO limited_queue (queue, concurrency, per_second, burst, limited_by) VALUES ('stock', 3, 2, 5, 'ann')"
    )
    [delivery] = rows.messages()
    said = "limited to 3 at once and 2/s, 5 at a time"
    assert f"{said} by ann" in await shown(console, "/")
    assert f"Its queue is {said}" in await shown(console, f"/events/{delivery}")


async def test_dead_letters_are_grouped_by_what_went_wrong(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    for number in range(3):
        rows.dead_letters(1, error=f"<ada{number}@example.com>: 450 try again in {number} s")
    rows.dead_letters(2, error="no route to host")
    page = await shown(console, "/dead-letters")
    assert "3 orders.send_confirmation MailError …: … try again in … s" in page
    assert "2 orders.send_confirmation MailError no route to host" in page
    html = (await console.get("/dead-letters")).text
    group = re.search(r"group=([0-9a-f]{12})", html)
    assert group
    one_group = await shown(console, f"/dead-letters?group={group[1]}")
    assert "450 try again in 2 s" in one_group
    assert one_group.count("no route to host") == 1  # in the table of groups alone
    assert one_group.count("failed 3 times") == 3


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("consumer=orders.send_confirmation", [1, 2]),
        ("queue=stock", [3]),
        ("error=NO+SUCH", [1]),
        ("event_type=order.placed&error=450", [2]),
        ("state=any", [1, 2, 3, 4]),
        ("state=discarded", [4]),
        ("consumer=nobody", []),
    ],
)
async def test_dead_letters_are_filtered(
    console: httpx.AsyncClient, rows: LedgerRows, query: str, numbers: list[int]
) -> None:
    rows.dead_letters()
    rows.dead_letters(error="450 later")
    rows.dead_letters(queue="'stock'", consumer="'orders.reserve_stock'", error="boom")
    rows.dead_letters(consumer="'other.one'", error="x")
    rows.sql("UPDATE dead_letter SET resolution = 'discarded', resolved_by = 'bob', resolved_why = 'old' WHERE id = 4")
    answer = await console.get(f"/dead-letters?{query}")
    assert sorted({int(each) for each in re.findall(r"/dead-letters/(\d+)", answer.text)}) == numbers


async def test_one_dead_letter_has_all_that_is_known_but_its_payload(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    [delivery] = rows.dead_letters()
    page = await shown(console, "/dead-letters/1")
    for fact in ("failed 3 times", "550 no such user", "orders/consumers.py:30 send", str(delivery), "email", "abc"):
        assert fact in page
    rows.sql("UPDATE dead_letter SET resolution = 'discarded', resolved_by = 'bob', resolved_why = 'old' WHERE id = 1")
    assert "It was discarded by bob at" in await shown(console, "/dead-letters/1")
    assert "There is no dead letter 2" in await shown(console, "/dead-letters/2", 404)
    await shown(console, "/dead-letters/99999999999999999999", 404)


async def test_the_story_of_an_event_is_one_time_line_over_all_its_consumers(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    event = new_event_id()
    completed = {"state": "'completed'", "dispatches": "1", "attempts": "1"}
    times = {
        "created_at": "'2026-01-02T03:00:00Z'", "dispatched_at": "'2026-01-02T03:00:01Z'",
        "started_at": "'2026-01-02T03:00:02Z'", "completed_at": "'2026-01-02T03:00:09Z'",
    }  # fmt: skip
    rows.messages(1, event, 1, **completed, **times)
    failed = [{"at": "2026-01-02T03:00:05+00:00", "attempt": 1, "type": "Boom", "message": "no"}]
    rows.messages(
        1, event, 2, consumer="'orders.count'", errors=literal(failed), attempts="1",
        due_at="now() + interval '10 minutes'", created_at="'2026-01-02T03:00:00Z'",
    )  # fmt: skip
    page = await shown(console, f"/events/{event}")
    order = [page.index(each) for each in ("It was published", "handed it", "began its 1st", "failed with Boom: no",
                                           "It was completed")]  # fmt: skip
    assert order == sorted(order)
    assert "It waits for its 2nd attempt, due in 10 min" in page
    assert "for orders.reserve_stock, orders.count" in page
    assert (await shown(console, f"/events/{rows.messages(1, event, 3)[0]}")).count(str(event)) >= 1
    assert "Nothing is known of" in await shown(console, f"/events/{new_event_id()}", 404)


async def test_causes_and_effects_lead_from_one_event_to_the_next(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    [placed] = rows.messages(1)
    caused = literal({"correlation_id": "abc", "causation_id": str(placed)})
    [confirmed] = rows.messages(1, event_type="'order.confirmed'", headers=caused)
    caused = literal({"correlation_id": "abc", "causation_id": str(confirmed)})
    rows.dead_letters(1, event_type="'mail.sent'", headers=caused)
    rows.messages(1, event_type="'of.another.request'", headers=literal({"correlation_id": "xyz"}))
    page = await shown(console, f"/events/{confirmed}")
    family = page[page.index("Causes and effects") :]
    assert "caused by order.placed" in family
    assert "mail.sent" in family
    assert "of.another.request" not in family
    family = (await shown(console, f"/events/{placed}")).partition("Causes and effects")[2]
    assert family.index("order.placed") < family.index("order.confirmed") < family.index("mail.sent")
    lost = literal({"causation_id": str(new_event_id())})
    [orphan] = rows.messages(1, headers=lost)
    assert "no longer kept" in await shown(console, f"/events/{orphan}")


async def test_events_are_found_by_id_correlation_and_state(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    [delivery] = rows.messages(1, headers=literal({"correlation_id": "req-17"}))
    rows.dead_letters(1)
    answer = await console.get("/events", params={"q": f" {delivery} "})
    assert answer.headers["location"] == f"/events/{delivery}"
    page = await shown(console, "/events?q=req-17")
    assert page.count("orders.reserve_stock: pending") == 1
    assert "orders.send_confirmation" not in page
    page = await shown(console, "/events?state=dead")
    assert "orders.send_confirmation: dead" in page
    assert "orders.reserve_stock" not in page
    assert "No event matches" in await shown(console, "/events?until=2020-01-01")
    await shown(console, "/events?until=tomorrow", 422)
    await shown(console, "/events?state=wrong", 422)


async def test_processes_are_told_apart_from_those_that_fell_silent(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    rows.sql(
        "INSERT INTO outbox_process (id, kind, host, pid, queues, threads, version, seen_at, running) VALUES "
        "(gen_random_uuid(), 'worker', 'one', 11, '{stock,email}', 8, 'v7', now(), 3), "
        "(gen_random_uuid(), 'relay', 'two', 22, '{}', 0, '', now() - interval '5 minutes', 0)"
    )
    page = await shown(console, "/processes")
    assert "worker one 11 alive stock, email 8 3" in page
    assert "relay two 22 silent for 5 min" in page


async def test_schedules_are_shown_with_what_keeps_them_from_firing(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    rows.schedule("a.on")
    rows.schedule("b.late", next_at="now() - interval '5 minutes'", declared="false")
    rows.schedule("c.lost", new_event_id(), cron="NULL", every="interval '90 seconds'")
    rows.schedule("d.paused", paused_at="now() - interval '3 hours'", paused_by="'ann'", why="'stocktaking'")
    rows.schedule("e.dead", rows.dead_letters(1, consumer="'outbox.tick'")[0])
    page = await shown(console, "/schedules")
    assert re.search(
        r"a.on in the code report.due queue email 0 3 \* \* \* Europe/Berlin \S+ \S+Z in 60 min \S on", page
    )
    assert "b.late made at run time" in page
    assert "due for 5 min \N{EN DASH} late: no worker of queue email has run it" in page
    assert "every 90s" in page
    assert "its tick is lost: resume it Resume Run" in page
    assert "once it is resumed \N{EN DASH} paused for 3 h by ann: stocktaking Resume Run" in page
    assert "stopped by dead letter 1 Pause Run" in page
    standing = await shown(console, "/schedules?standing=true")
    assert [name for name in ("a.on", "b.late", "c.lost", "d.paused", "e.dead") if name not in standing] == ["a.on"]
    one = await shown(console, "/schedules?name=LATE")
    assert [name for name in ("a.on", "b.late", "c.lost") if name in one] == ["b.late"]
    await shown(console, "/schedules?standing=wrong", 422)


async def test_lanes_are_shown_with_what_they_wait_for(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    parked = {"due_at": "outbox_parked()"}
    rows.messages(3, None, 1, lane="'order:running'", **parked)  # and so the first is due
    rows.sql("UPDATE outbox_message SET state = 'running', attempts = 2 WHERE due_at < outbox_parked()")
    rows.dead_letters(1, lane="'order:dead'", position="1", blocks="true", died_at="now() - interval '3 hours'")
    rows.messages(2, None, 1, lane="'order:dead'", **parked)
    rows.messages(2, None, 1, lane="'order:stranded'", **parked)
    rows.sql("UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = 'order:stranded'")
    page = await shown(console, "/lanes")
    assert "order:dead 2 dead letter 1 , 3 h ago: failed 3 times orders.send_confirmation queue email" in page
    assert "order:running 2 a worker, which is at attempt 2 orders.reserve_stock queue stock" in page
    assert "order:stranded 2 nothing: it has to be repaired Repair" in page
    assert page.index("order:stranded") < page.index("order:dead") < page.index("order:running")


async def test_of_very_many_schedules_the_first_are_shown(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.sql(
        "INSERT INTO outbox_schedule (name, declared, event_type, version, payload, cron, tz, catch_up, queue, next_at)"
        " SELECT 'n' || n, false, 'a', 1, '{}', '* * * * *', 'UTC', 'all', 'q', now() FROM generate_series(1, 300) AS n"
    )
    page = await shown(console, "/schedules")
    assert page.count("made at run time") == 200
    assert "The first 200" in page


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 6 }}\u202egnp"


async def test_what_was_stored_reaches_a_page_as_text(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    quoted = "'" + HOSTILE.replace("'", "''") + "'"
    errors = [{"type": HOSTILE, "message": HOSTILE, "traceback": HOSTILE, "attempt": 1, "at": "2026-01-01T00:00:00Z"}]
    names = {"consumer": quoted, "queue": quoted, "event_type": quoted, "headers": literal({"correlation_id": HOSTILE})}
    [delivery] = rows.dead_letters(1, reason=quoted, **names | {"errors": literal(errors)})
    rows.messages(1, None, 1, **names)
    rows.sql(f"INSERT INTO paused_queue VALUES ({quoted}, now(), {quoted}, {quoted})")
    rows.schedule(HOSTILE, paused_at="now()", paused_by=quoted, why=quoted)
    rows.messages(2, None, 1, lane=quoted, due_at="outbox_parked()", **names)
    pages = ["/", "/dead-letters", "/dead-letters/1", "/events", f"/events/{delivery}", "/schedules", "/lanes"]
    pages += [f"/schedules/run?schedule={quote_plus(HOSTILE)}", f"/lanes/repair?lane={quote_plus(HOSTILE)}"]
    pages += [f"/dead-letters?{quote_plus(name)}={quote_plus(HOSTILE)}" for name in ("consumer", "error", "queue")]
    for path in pages:
        answer = await console.get(path)
        assert answer.status_code == 200, path
        assert "<script>alert" not in answer.text
        assert "<img" not in answer.text
        assert "{{ 7 * 6 }}" in answer.text
        assert "\u202e" not in answer.text
        assert "\\u202egnp" in answer.text


async def test_what_cannot_be_stored_is_not_found(console: httpx.AsyncClient) -> None:
    for parameter in ("consumer", "error", "queue"):
        assert "No dead letter matches" in await shown(console, f"/dead-letters?{parameter}=%00")
    assert "No event matches" in await shown(console, "/events?q=%00&consumer=%00")
    await shown(console, "/dead-letters?group=%00")


async def test_a_page_of_many_looks_at_a_bounded_number(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters()
    rows.sql(
        "INSERT INTO dead_letter (message_id, event_id, event_type, version, consumer, queue, payload, headers, "
        "attempts, dispatches, created_at, errors, reason) SELECT gen_random_uuid(), gen_random_uuid(), event_type, "
        f"version, 'many', queue, payload, headers, 1, 1, now(), errors, reason FROM dead_letter, "
        f"generate_series(1, {BOUND})"
    )
    assert f"of {BOUND:,} among the newest {BOUND:,}" in await shown(console, "/dead-letters?consumer=many")
    assert f"0 among the newest {BOUND:,}" in await shown(console, "/dead-letters?consumer=orders.send_confirmation")


async def test_a_postgres_that_is_away_is_told(make_console: MakeConsole, by_proxy: As) -> None:
    app = make_console()
    away = DatabaseSettings(url=SecretStr("postgresql://nobody@127.0.0.1:1/none"), connect_timeout=1)
    app.state.settings = app.state.settings.model_copy(update={"database": away})
    async with serve(app) as client:
        client.headers.update(by_proxy("ann", "viewer"))
        assert "PostgreSQL does not answer" in await shown(client, "/")
        assert "PostgreSQL does not answer" in await shown(client, "/events", 503)
        assert (await client.get("/health/live")).status_code == 200
