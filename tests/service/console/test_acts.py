"""What operators do: to queues, to dead letters one by one and in bulk, and with payloads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from service.console import event_pages
from service.console.audit_page import KINDS
from service.console.operators import SECRET_HEADER
from service.ledger import event_search, operations, replaying
from service.ledger.ids import new_event_id
from service.outbox import Delivery, Event, consumer, upcaster
from tests.service.api.serving import serve
from tests.service.console.ledger_rows import SECRET, literal
from tests.waiting import until

if TYPE_CHECKING:
    import httpx

    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows

ACTS = [
    ("/queues/pause", {"queue": "stock"}),
    ("/queues/resume", {"queue": "email"}),
    ("/queues/limit", {"queue": "stock", "concurrency": "3"}),
    ("/queues/unlimit", {"queue": "email"}),
    ("/lanes/repair", {"lane": "stranded"}),
    ("/schedules/pause", {"schedule": "on"}),
    ("/schedules/resume", {"schedule": "off"}),
    ("/schedules/run", {"schedule": "on"}),
    ("/dead-letters/1/replay", {}),
    ("/dead-letters/1/discard", {}),
    ("/dead-letters/replay/many", {"until": "2999-01-01T00:00:00+00:00"}),
    ("/dead-letters/discard/many", {"until": "2999-01-01T00:00:00+00:00"}),
    ("/dead-letters/1/payload", {}),
    ("/dead-letters/1/edit", {"payload": "{}"}),
    ("/events/by-value", {"value": "17"}),
    ("/operations/1/stop", {}),
    ("/operations/1/resume", {}),
]


async def token(client: httpx.AsyncClient) -> str:
    """That of the client's session."""
    page = await client.get("/dead-letters/1")
    found = re.search(r'name="token" value="([0-9a-f]{64})"', page.text)
    return found[1] if found else ""


async def send(client: httpx.AsyncClient, path: str, why: str = "a test", **fields: str) -> httpx.Response:
    """What a form of a page sends."""
    return await client.post(path, data={"token": await token(client), "why": why, **fields})


def state(rows: LedgerRows) -> str:
    """Of all that an act could change."""
    return rows.sql(
        "SELECT (SELECT string_agg(queue, ',' ORDER BY queue) FROM paused_queue), "
        "(SELECT string_agg(queue || concurrency, ',' ORDER BY queue) FROM limited_queue), "
        "(SELECT count(*) FROM outbox_message WHERE due_at > '9000-01-01' AND lane IS NOT NULL), "
        "(SELECT string_agg(name, ',' ORDER BY name) FROM outbox_schedule WHERE paused_at IS NOT NULL), "
        "(SELECT count(*) FROM outbox_message), "
        "(SELECT string_agg(coalesce(resolution, 'open'), ',' ORDER BY id) FROM dead_letter), "
        "(SELECT count(*) FROM outbox_operation)"
    )


def strand(rows: LedgerRows, lane: str) -> None:
    """Leave two deliveries that wait for nothing in a lane."""
    rows.messages(2, lane=f"'{lane}'", due_at="outbox_parked()")
    rows.sql(f"UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = '{lane}'")


@pytest.mark.parametrize(("path", "fields"), ACTS)
@pytest.mark.parametrize("wrong", ["a viewer", "no token", "no reason"])
async def test_nothing_is_done_for_who_may_not_or_does_not_say_why(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows, path: str, fields: dict[str, str], wrong: str
) -> None:
    rows.dead_letters(2)
    rows.sql("INSERT INTO paused_queue VALUES ('email', now(), 'ann', 'x')")
    rows.sql("INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('email', 1, 'ann')")
    strand(rows, "stranded")
    rows.schedule("on")
    rows.schedule("off", new_event_id(), paused_at="now()", paused_by="'ann'")
    before = state(rows)
    groups = ["viewer"] if wrong == "a viewer" else ["operator", "payload"]
    async with serve(make_console()) as client:
        client.headers.update(by_proxy("ann", "operator", "payload"))
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        given = {"token": await token(client), "why": "a test", **fields}  # pages show a viewer no form to take it from
        client.headers.update(by_proxy("ann", *groups))
        if wrong == "no token":
            given["token"] = "0" * 64
        if wrong == "no reason":
            given["why"] = "  "
        answer = await client.post(path, data=given)
        assert answer.status_code == (422 if wrong == "no reason" else 403), answer.text
        assert SECRET not in answer.text
    assert state(rows) == before


async def test_a_queue_is_paused_and_resumed_with_a_reason(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters()
    for queue in ("stock", "*"):
        assert "wait in PostgreSQL" in (await console.get(f"/queues/pause?queue={queue}")).text
        for _ in range(2):  # somebody may have been faster
            assert (await send(console, "/queues/pause", queue=queue)).status_code == 303
        assert rows.sql("SELECT paused_by, why FROM paused_queue") == "ann|a test"
        assert (await send(console, "/queues/resume", queue=queue)).status_code == 303
        assert rows.sql("SELECT count(*) FROM paused_queue") == "0"
    assert (await console.get("/queues/pause?queue=no+name")).status_code == 422
    assert (await send(console, "/queues/pause", queue="a b")).status_code == 422
    audit = (await console.get("/audit")).text
    assert audit.count("<td>pause</td>") == audit.count("<td>resume</td>") == 2


async def test_a_queue_is_limited_and_unlimited_with_a_reason(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters()
    limits = "SELECT concurrency, per_second, burst, limited_by, why FROM limited_queue"
    given = {"queue": "partner", "concurrency": "4", "rate": "600/m"}
    assert (await send(console, "/queues/limit", "the contract", **given)).headers["location"] == "/"
    assert rows.sql(limits) == "4|10|1|ann|the contract"
    form = (await console.get("/queues/limit?queue=partner")).text
    assert "Limited to 4 at once and 10/s, 1 at a time" in form
    assert re.findall(r'value="([^"]*)"></label>', form) == ["4", "10/s", "1"]
    for wrong, said in (
        ({}, "Limit it to what?"), ({"concurrency": "many"}, "is no number"), ({"concurrency": "0"}, "is not between"),
        ({"rate": "10"}, "is no rate"), ({"concurrency": "1", "burst": "2"}, "it needs one"), ({"queue": "*"}, "name"),
    ):  # fmt: skip
        answer = await send(console, "/queues/limit", **{"queue": "partner"} | wrong)
        assert (answer.status_code, said in answer.text) == (422, True), wrong
    for _ in range(2):  # somebody may have been faster
        assert (await send(console, "/queues/unlimit", queue="partner")).status_code == 303
    assert rows.sql(limits) == ""
    audit = (await console.get("/audit")).text
    assert (audit.count("<td>limit</td>"), audit.count("<td>unlimit</td>")) == (1, 1)


@pytest.mark.slow
async def test_a_limit_that_a_hand_over_holds_up_is_refused_and_that_is_said(
    console: httpx.AsyncClient, rows: LedgerRows, database_url: str
) -> None:
    rows.dead_letters()
    relay = await asyncpg.connect(database_url)
    try:
        async with relay.transaction():
            await relay.execute("SELECT FROM limited_queue")
            answer = await send(console, "/queues/limit", queue="partner", concurrency="1")
        assert (answer.status_code, "Nothing was done: try again" in answer.text) == (503, True)
    finally:
        await relay.close()
    assert rows.sql("SELECT count(*) FROM limited_queue") == "0"


async def test_a_stranded_lane_is_repaired_with_a_reason(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters()
    strand(rows, "order:7")
    assert "Repair lane order:7" in (await console.get("/lanes/repair?lane=order:7")).text
    for _ in range(2):  # somebody may have been faster
        assert (await send(console, "/lanes/repair", lane="order:7")).headers["location"] == "/lanes"
    assert rows.sql("SELECT count(*) FROM outbox_message WHERE due_at <= now()") == "1"
    assert rows.sql("SELECT kind, about, asked_by, why FROM outbox_operation") == (
        'repair|{"lane": "order:7"}|ann|a test'
    )


async def test_a_schedule_is_paused_resumed_and_run_with_a_reason(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters()
    name = "reminder:7 & <b>"
    rows.schedule(name)
    ticks = "SELECT count(*) FROM outbox_message WHERE consumer = 'outbox.tick'"
    paused = "SELECT paused_by, why FROM outbox_schedule"
    asked = await console.get("/schedules/pause", params={"schedule": name})
    assert 'name="schedule" value="reminder:7 &amp; &lt;b&gt;"' in asked.text
    assert "the latest one follows then" in asked.text
    for _ in range(2):  # somebody may have been faster
        assert (await send(console, "/schedules/pause", schedule=name)).headers["location"] == "/schedules"
    assert (rows.sql(paused), rows.sql(ticks)) == ("ann|a test", "0")
    answer = await send(console, "/schedules/run", "they ask for it", schedule=name)
    event = answer.headers["location"].removeprefix("/events/")
    assert rows.sql(f"SELECT payload ->> 'why' FROM outbox_message WHERE event_id = '{event}'") == "they ask for it"
    assert (await console.get(answer.headers["location"])).status_code == 200
    for _ in range(2):
        assert (await send(console, "/schedules/resume", schedule=name)).status_code == 303
    assert (rows.sql(paused), rows.sql(ticks)) == ("|", "2")
    for act in ("pause", "resume", "run"):
        assert (await console.get(f"/schedules/{act}?schedule=none")).status_code == 404
        assert (await send(console, f"/schedules/{act}", schedule="none")).status_code == 404
    kinds = (
        "SELECT string_agg(kind, ' ' ORDER BY id) FROM outbox_operation WHERE about ->> 'schedule' = $$" + name + "$$"
    )
    assert rows.sql(kinds) == "pause run resume"
    assert "<td>run</td>" in (await console.get("/audit?kind=run")).text


def test_the_audit_can_be_narrowed_to_each_kind_of_act() -> None:
    ledger = Path(operations.__file__).parent
    recorded = {kind for file in ledger.glob("*.py") for kind in re.findall(r'record\(\w+, "(\w+)"', file.read_text())}
    assert {"pause", "run", "edit"} <= recorded
    assert recorded - set(KINDS) == set()


async def test_one_dead_letter_is_replayed_and_another_discarded(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    deliveries = rows.dead_letters(2)
    answer = await send(console, "/dead-letters/1/replay", "mail server repaired")
    assert answer.headers["location"] == "/dead-letters/1"
    assert (await send(console, "/dead-letters/2/discard", "account deleted")).status_code == 303
    assert rows.sql("SELECT resolution, resolved_by, resolved_why FROM dead_letter ORDER BY id").split() == [
        "replayed|ann|mail", "server", "repaired", "discarded|ann|account", "deleted",
    ]  # fmt: skip
    assert rows.sql("SELECT id, state FROM outbox_message") == f"{deliveries[0]}|pending"
    again = await send(console, "/dead-letters/1/discard")
    assert again.status_code == 409
    assert "was replayed by ann" in again.text
    assert "There is no dead letter 9" in (await send(console, "/dead-letters/9/replay")).text


async def test_many_are_replayed_as_they_were_shown(console: httpx.AsyncClient, rows: LedgerRows) -> None:
    rows.dead_letters(3, error="450 later 1")
    rows.dead_letters(2, error="no route to host")
    group = re.search(r"group=([0-9a-f]{12})[^>]*>MailError</a> …", (await console.get("/dead-letters")).text)
    assert group
    query = f"consumer=orders.send_confirmation&group={group[1]}"
    preview = (await console.get(f"/dead-letters/replay/many?{query}")).text
    assert "Replay 3 dead letters?" in preview
    rows.dead_letters(1, error="450 later 2")  # after it was looked at
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', preview))
    answer = await send(console, "/dead-letters/replay/many", **{**fields, "why": "repaired"})
    assert answer.headers["location"] == "/operations/1"
    await until(lambda: rows.sql("SELECT state, done FROM outbox_operation") == "finished|3", what="the operation")
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution IS NULL") == "3"
    page = (await console.get("/operations/1")).text
    assert "3 of 3 done" in page
    assert "repaired" in page
    assert f"group {group[1]}" in page
    assert (await send(console, "/dead-letters/replay/many", **fields)).status_code == 409


async def test_an_operation_is_stopped_and_gone_on_with_at_another_rate(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    rows.dead_letters(60)
    preview = (await console.get("/dead-letters/discard/many")).text
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', preview))
    for rate in ("0", "nan", "fast", "1e9"):
        assert (await send(console, "/dead-letters/discard/many", **fields, rate=rate)).status_code == 422
    await send(console, "/dead-letters/discard/many", **fields, rate="4")
    await until(lambda: rows.sql("SELECT done > 0 FROM outbox_operation") == "t")
    assert "Stop it" in (await console.get("/operations/1")).text
    assert (await send(console, "/operations/1/resume")).status_code == 409
    await send(console, "/operations/1/stop", "too fast")
    assert "Go on with it" in (await console.get("/operations/1")).text
    assert (await send(console, "/operations/1/resume", "slow enough", rate="1000")).status_code == 303
    await until(lambda: rows.sql("SELECT state, done FROM outbox_operation WHERE id = 1") == "finished|60")
    audit = re.sub(r"<[^>]*>", " ", (await console.get("/audit")).text)
    for why in ("too fast", "slow enough"):
        assert why in audit


async def test_a_console_that_stops_leaves_its_operation_stopped(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows
) -> None:
    rows.dead_letters(50)
    async with serve(make_console()) as client:
        client.headers.update(by_proxy("ann", "operator"))
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        await send(client, "/dead-letters/replay/many", until="2999-01-01T00:00:00+00:00", rate="1")
        await until(lambda: rows.sql("SELECT done > 0 FROM outbox_operation") == "t")
    assert rows.sql("SELECT state FROM outbox_operation") == "stopped"


async def test_two_operators_at_once_do_each_thing_once(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replaying, "BATCH", 5)
    rows.dead_letters(200)
    async with serve(make_console()) as ann, serve(make_console()) as bob:
        for client, name in ((ann, "ann"), (bob, "bob")):
            client.headers.update(by_proxy(name, "operator"))
            client.headers["Origin"] = str(client.base_url).rstrip("/")
        for client, act in ((ann, "replay"), (bob, "discard")):
            await send(client, f"/dead-letters/{act}/many", until="2999-01-01T00:00:00+00:00")
        await until(lambda: rows.sql("SELECT bool_and(state = 'finished') FROM outbox_operation") == "t")
    done = rows.sql("SELECT sum(done), sum(done) + sum(refused) >= 200 FROM outbox_operation")
    assert done == "200|t"
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution IS NULL") == "0"
    counted = "SELECT (SELECT count(*) FROM outbox_message) = count(*) FROM dead_letter WHERE resolution = 'replayed'"
    assert rows.sql(counted) == "t"


async def test_a_payload_is_shown_to_who_says_why_and_that_is_on_record(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows
) -> None:
    rows.dead_letters()
    [delivery] = rows.messages()
    async with serve(make_console()) as client:
        client.headers.update(by_proxy("pat", "payload"))
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        for path in ("/dead-letters/1/payload", f"/events/{delivery}/payload"):
            answer = await send(client, path, "ticket 17")
            assert answer.status_code == 200
            assert SECRET in answer.text
            assert answer.headers["cache-control"] == "no-store"
            assert "<textarea" not in answer.text
    record = rows.sql("SELECT kind, about, asked_by, why FROM outbox_operation ORDER BY id").splitlines()
    assert record == [
        'reveal|{"dead_letter": 1}|pat|ticket 17', f'reveal|{{"event": "{delivery}"}}|pat|ticket 17',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        ("{", "this is no JSON"),
        ("[]", "a payload is a JSON object"),
        ({"order_id": "no uuid"}, "could not read this"),
        ({"order_id": "0193c3f4-8a51-7c5e-9b1a-4f6f3a2b1c0d", "ordre": 1}, "has no field ordre"),
        ({}, "could not read this"),
        ({"order_id": SECRET}, "nothing differs"),
    ],
)
async def test_a_payload_that_the_consumer_could_not_read_is_refused(
    console: httpx.AsyncClient, rows: LedgerRows, payload: Any, said: str
) -> None:
    pytest.importorskip("service.domains.orders.consumers")
    rows.dead_letters(1, event_type="'order.confirmed'")
    text = payload if isinstance(payload, str) else json.dumps(payload)
    answer = await send(console, "/dead-letters/1/edit", payload=text)
    assert answer.status_code == 422
    assert said in answer.text
    assert "<textarea" in answer.text  # with what was written, to go on from
    assert rows.sql("SELECT count(*) FROM outbox_message") == "0"


async def test_a_payload_is_put_right_and_the_dead_letter_keeps_the_original(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    pytest.importorskip("service.domains.orders.consumers")
    [delivery] = rows.dead_letters(1, event_type="'order.confirmed'")
    right = {"order_id": "0193c3f4-8a51-7c5e-9b1a-4f6f3a2b1c0d"}
    answer = await send(console, "/dead-letters/1/edit", "the order was merged", payload=json.dumps(right))
    assert answer.status_code == 303
    new = rows.sql(f"SELECT payload, id <> '{delivery}' FROM outbox_message")
    assert new == f"{json.dumps(right)}|t"
    kept = rows.sql("SELECT resolution, resolved_by, payload FROM dead_letter")
    assert kept == f'edited|ann|{{"order_id": "{SECRET}"}}'
    story = await console.get(answer.headers["location"])
    assert "ann edited it: the order was merged" in re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", story.text))
    assert "edited" in (await console.get("/dead-letters?state=edited")).text


class Moved(Event, type="console.moved", version=2):
    """Once had its place under another name."""

    place: str
    floor: int = 0


@upcaster(Moved, from_version=1)
def _rename(fields: dict[str, Any]) -> dict[str, Any]:
    return {"place": fields["where"]}


@consumer(Moved, queue="moves", name="console.move")
async def _move(event: Moved, delivery: Delivery) -> None:
    """Nothing of it runs here."""


async def test_a_payload_of_an_earlier_version_is_put_right_as_its_consumer_is_given_it(
    console: httpx.AsyncClient, rows: LedgerRows
) -> None:
    kind = {"event_type": "'console.moved'", "consumer": "'console.move'"}
    rows.dead_letters(1, payload=literal({"where": "Rome"}), **kind)
    rows.dead_letters(1, payload=literal({"erehw": "Rome"}), **kind)
    shown = (await send(console, "/dead-letters/1/payload")).text
    assert "version 1, for console.move; shown as version 2 has it" in shown
    assert "&#34;place&#34;: &#34;Rome&#34;" in shown
    assert "has no field where" in (await send(console, "/dead-letters/1/edit", payload='{"where": "Bari"}')).text
    assert "nothing differs" in (await send(console, "/dead-letters/1/edit", payload='{"place": "Rome"}')).text
    assert (await send(console, "/dead-letters/1/edit", payload='{"place": "Bari"}')).status_code == 303
    assert rows.sql("SELECT version, payload FROM outbox_message") == '2|{"floor": 0, "place": "Bari"}'
    assert rows.sql("SELECT version, payload FROM dead_letter WHERE id = 1") == '1|{"where": "Rome"}'
    assert "an upcaster of Moved cannot read version 1" in (await send(console, "/dead-letters/2/payload")).text


async def test_events_are_found_by_a_value_in_their_payload_and_that_is_on_record(
    console: httpx.AsyncClient, rows: LedgerRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = "0193c3f4-8a51-7c5e-9b1a-4f6f3a2b1c0d"
    [oldest] = rows.messages(1, payload=literal({"lines": [{"order": order, "count": 17}]}))
    rows.dead_letters(1, payload=literal({"order_id": order}), event_type="'order.died'")
    rows.messages(2, payload=literal({"note": f"of {order}", "count": 170}))

    async def found(value: str, **fields: str) -> str:
        answer = await send(console, "/events/by-value", "ticket 17", value=value, **fields)
        assert (answer.status_code, value in str(answer.url)) == (200, False)
        return answer.text

    def types(page: str) -> list[str]:
        return re.findall(r"</code></a></th><td>([a-z.]+)</td>", page)

    assert types(await found(order.upper())) == ["order.died", "order.placed"]
    assert types(await found("17")) == ["order.placed"]
    assert types(await found(order, event_type="order.died")) == ["order.died"]
    assert "No event matches" in await found("of")
    assert (await send(console, "/events/by-value", value="")).status_code == 422
    record = "SELECT kind, about, asked_by, why FROM outbox_operation ORDER BY id LIMIT 1"
    assert rows.sql(record) == f'search|{{"value": "{order.upper()}"}}|ann|ticket 17'

    monkeypatch.setattr(event_pages, "LOOKED_INTO", 3)  # as where there are very many
    page = await found("17")
    assert "Looked at the newest 3 deliveries; there are older ones" in page
    until = re.search(r'name="until" value="([^"]+)"><input', page)
    assert until
    assert str(oldest)[:34] in await found("17", until=until[1])


async def test_a_search_is_bounded_in_rows_and_in_time(
    console: httpx.AsyncClient, rows: LedgerRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.dead_letters(1)  # its page has the token
    rows.messages(5)
    monkeypatch.setattr(event_search, "PAGE", 2)
    monkeypatch.setattr(event_pages, "LOOKED_AT", 4)
    assert "Looked at the newest 4 deliveries" in (await console.get("/events?event_type=no.such")).text
    monkeypatch.setattr(event_pages, "LOOKS_FOR", 0.0)
    answer = await send(console, "/events/by-value", "ticket 17", value="no such")
    assert "Looked at the newest 2 deliveries" in answer.text


async def test_names_and_reasons_reach_pages_as_text(make_console: MakeConsole, by_proxy: As, rows: LedgerRows) -> None:
    rows.dead_letters(1)
    hostile = "<img src=x onerror=alert(1)>"
    async with serve(make_console()) as client:
        client.headers.update(by_proxy(hostile, "operator"))
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        await send(client, "/dead-letters/1/discard", hostile)
        rows.sql(f"INSERT INTO outbox_operation (kind, about, asked_by) VALUES ('x', {literal({'a': hostile})}, 'b')")
        for path in ("/audit", "/operations", "/operations/1", "/operations/2", "/dead-letters/1", "/"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert "<img" not in answer.text
            assert SECRET_HEADER not in answer.text
