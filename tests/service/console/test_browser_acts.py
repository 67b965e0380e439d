"""Everything that operators do, in a real browser, on a real PostgreSQL, broker, relay and worker."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import pytest

from service.console.passwords import hashed
from service.dev.servers import free_port
from service.outbox import publish
from service.settings import ConsoleUser
from tests.servers.processes import Processes, Started
from tests.servers.relaying import relaying
from tests.service.api.serving import serve
from tests.service.console.app import SCHEMA, Tried
from tests.service.console.browsing import browsing, needs_browser
from tests.service.console.conftest import PROXY_SECRET
from tests.service.console.ledger_rows import SECRET, literal
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from playwright.async_api import Page

    from service.database.sessions import SessionFactory
    from service.settings import Settings
    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture
async def url(make_console: MakeConsole) -> AsyncIterator[str]:
    async with serve(make_console()) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture
async def running(
    rows: LedgerRows, settings: Settings, environment: dict[str, str], tmp_path: Path
) -> AsyncIterator[None]:
    """A relay and a worker."""
    rows.sql(SCHEMA)
    processes = Processes(environment, tmp_path)
    try:
        await processes.worker("tests.service.console.app:setup_broker", "-p", "1", "-t", "2")
        async with relaying(settings):
            yield
    finally:
        await processes.stop()


async def publish_tries(sessions: SessionFactory, *names: str) -> None:
    async with sessions() as session:
        for name in names:
            publish(session, Tried(event_name=name, subject=uuid4()))
        await session.commit()


async def say_why(page: Page, button: str, why: str) -> None:
    """Fill in the form that has this button, and press it by the keyboard."""
    form = page.locator("form").filter(has=page.get_by_role("button", name=button, exact=True))
    await form.get_by_label("Why, for the record").fill(why)
    await form.get_by_role("button", name=button, exact=True).focus()
    await page.keyboard.press("Enter")


async def test_every_act_from_the_dead_letter_to_its_effect(
    url: str, running: None, rows: LedgerRows, sessions: SessionFactory, by_proxy: As
) -> None:
    async with browsing(by_proxy("ann", "operator", "payload")) as visit:
        page = visit.page
        await publish_tries(sessions, "one", "two", "three")
        await page.goto(f"{url}/dead-letters")  # and it shows by itself what dies
        await page.get_by_text("is broken").nth(2).wait_for()

        rows.sql("INSERT INTO repaired VALUES ('one'), ('well')")
        number = rows.sql("SELECT id FROM dead_letter WHERE payload ->> 'event_name' = 'one'")
        await page.goto(f"{url}/dead-letters/{number}")
        await say_why(page, "Replay it", "one is repaired")
        await page.get_by_text("It was replayed by ann").wait_for()
        await until(lambda: rows.sql("SELECT string_agg(subject, ' ') FROM effect") == "one", what="the effect")
        await page.get_by_role("link", name="console.tried").click()
        await page.get_by_text("It was completed.").wait_for()

        number = rows.sql("SELECT id FROM dead_letter WHERE payload ->> 'event_name' = 'two'")
        await page.goto(f"{url}/dead-letters/{number}")
        await page.get_by_text("hidden", exact=True).click()
        await say_why(page, "Show it", "ticket 17")
        payload = page.get_by_label("Payload, as JSON")
        text = await payload.input_value()
        assert '"event_name": "two"' in text
        await payload.fill(text.replace("event_name", "event_nam"))
        await say_why(page, "Replay with this payload", "the name was wrong")
        await page.get_by_text("Tried has no field event_nam").wait_for()
        await payload.fill(text.replace("two", "well"))
        await say_why(page, "Replay with this payload", "the name was wrong")
        await page.get_by_text("ann edited it: the name was wrong").wait_for()
        await page.get_by_text("It was completed.").wait_for()
        assert rows.sql("SELECT string_agg(subject, ' ' ORDER BY subject) FROM effect") == "one well"
        assert rows.sql(f"SELECT payload ->> 'event_name' FROM dead_letter WHERE id = {number}") == "two"

        number = rows.sql("SELECT id FROM dead_letter WHERE payload ->> 'event_name' = 'three'")
        await page.goto(f"{url}/dead-letters/{number}")
        await say_why(page, "Discard it", "never mind")
        await page.get_by_text("It was discarded by ann").wait_for()

        await page.goto(f"{url}/events")
        await page.get_by_text("By a value in the payload").click()
        await page.get_by_label("Value").fill("THREE")
        await say_why(page, "Search payloads", "ticket 18")
        await page.get_by_role("heading", name="Events with THREE").wait_for()
        assert await page.get_by_role("row", name=re.compile("console.tried")).count() == 1
        assert await visit.obstacles() == []
        assert "THREE" not in page.url.upper()

        await page.goto(url)
        await page.get_by_role("link", name="Pause tries").click()
        await say_why(page, "Pause queue tries", "it breaks")
        await page.get_by_text(re.compile("paused for .* by ann: it breaks")).wait_for()
        await publish_tries(sessions, "one")
        await page.get_by_role("row", name=re.compile(r"console.try_it 1 0 0")).wait_for()
        await page.get_by_role("link", name="Resume tries").click()
        await say_why(page, "Resume queue tries", "repaired")
        await until(lambda: rows.sql("SELECT count(*) FROM effect WHERE subject = 'one'") == "2", what="the effect")

        await page.get_by_role("link", name="Limit tries").click()
        await page.get_by_label("So many at once").fill("0")
        await say_why(page, "Limit queue tries", "the partner asks for it")
        await page.get_by_text("is not between").wait_for()
        await page.go_back()
        await page.get_by_label("So many at once").fill("2")
        await page.get_by_label("So many start").fill("6000/m")
        await say_why(page, "Limit queue tries", "the partner asks for it")
        await page.get_by_text("limited to 2 at once and 100/s, 10 at a time by ann").wait_for()
        await page.get_by_role("link", name="Unlimit tries").click()
        await say_why(page, "Unlimit queue tries", "the contract ended")
        await page.get_by_text("limited to").wait_for(state="detached")

        await publish_tries(sessions, *["many"] * 30)
        await until(lambda: rows.sql("SELECT count(*) FROM dead_letter WHERE resolution IS NULL") == "30")
        rows.sql("INSERT INTO repaired VALUES ('many')")
        await page.goto(f"{url}/dead-letters?consumer=console.try_it")
        await page.get_by_role("link", name="Fail").click()
        await page.get_by_role("link", name="Replay these…").click()
        await page.get_by_role("heading", name="Replay 30 dead letters?").wait_for()
        await page.get_by_label("At most so many a second").fill("20")
        await say_why(page, "Replay 30", "many are repaired")
        await page.get_by_text("30 of 30 done").wait_for()
        await page.locator("#state", has_text="finished").wait_for()
        await until(lambda: rows.sql("SELECT count(*) FROM effect WHERE subject = 'many'") == "30", what="effects")

        await page.goto(f"{url}/audit")
        for why in (
            "one is repaired",
            "ticket 17",
            "ticket 18",
            "the name was wrong",
            "never mind",
            "it breaks",
            "the partner asks for it",
            "the contract ended",
            "many are repaired",
        ):
            await page.get_by_role("cell", name=why).first.wait_for()
        assert [each for each in visit.complaints if "422" not in each] == []


async def test_a_schedule_and_a_lane_are_looked_after_by_the_keyboard(url: str, rows: LedgerRows, by_proxy: As) -> None:
    rows.schedule("nightly")
    rows.schedule("other")
    rows.messages(2, None, 1, lane="'order:7'", due_at="outbox_parked()")
    rows.sql("UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = 'order:7'")
    async with browsing(by_proxy("ann", "operator")) as visit:
        page = visit.page
        await page.goto(f"{url}/schedules")
        await page.get_by_role("link", name="Pause nightly").press("Enter")
        await say_why(page, "Pause nightly", "stocktaking")
        await page.get_by_text(re.compile("paused for .* by ann: stocktaking")).wait_for()
        await page.get_by_label("That").select_option("do not go on")
        await page.get_by_role("button", name="Filter").press("Enter")
        await page.get_by_role("link", name="Run other").wait_for(state="detached")
        await page.get_by_role("link", name="Run nightly").press("Enter")
        await say_why(page, "Run nightly", "they want it now")
        await page.get_by_role("heading", name="outbox.tick").wait_for()
        await page.get_by_text("It waits for its 1st attempt").wait_for()
        await page.goto(f"{url}/schedules")
        await page.get_by_role("link", name="Resume nightly").press("Enter")
        await page.get_by_text("the latest one follows").wait_for()
        await say_why(page, "Resume nightly", "counted")
        await page.get_by_text("paused for").wait_for(state="detached")
        assert rows.sql("SELECT count(*) FROM outbox_schedule WHERE paused_at IS NOT NULL") == "0"

        await page.goto(f"{url}/lanes")
        await page.get_by_role("link", name="Repair order:7").press("Enter")
        await say_why(page, "Repair order:7", "somebody wrote SQL")
        await page.get_by_text("a relay").wait_for()
        assert visit.complaints == []
    assert rows.sql("SELECT string_agg(kind, ' ' ORDER BY id) FROM outbox_operation") == "pause run resume repair"


async def test_two_operators_at_once_see_who_was_faster(url: str, rows: LedgerRows, by_proxy: As) -> None:
    rows.dead_letters()
    async with browsing(by_proxy("ann", "operator")) as ann, browsing(by_proxy("bob", "operator")) as bob:
        for visit in (ann, bob):
            await visit.page.goto(f"{url}/dead-letters/1")
        await say_why(ann.page, "Replay it", "repaired")
        await ann.page.get_by_text("It was replayed by ann").wait_for()
        await say_why(bob.page, "Discard it", "old")
        await bob.page.get_by_text(re.compile("Dead letter 1 was replayed by ann")).wait_for()
    assert rows.sql("SELECT resolution FROM dead_letter") == "replayed"


async def test_a_console_that_is_killed_in_a_bulk_replay_leaves_the_rest_to_the_next(
    environment: dict[str, str], tmp_path: Path, rows: LedgerRows, by_proxy: As
) -> None:
    rows.dead_letters(80)
    port = str(free_port())
    given = {**environment, "CONSOLE__PROXY": "127.0.0.1", "CONSOLE__SECRET": PROXY_SECRET, "CONSOLE__PORT": port}
    consoles: list[Started] = []

    async def start() -> str:
        console = Started(given, tmp_path / f"console-{len(consoles)}", "service.console")
        consoles.append(console)
        await until(lambda: console.says("Uvicorn running on"), what="the console")
        return f"http://127.0.0.1:{port}"

    try:
        url = await start()
        async with browsing(by_proxy("ann", "operator")) as visit:
            page = visit.page
            await page.goto(f"{url}/dead-letters/replay/many")
            await page.get_by_label("At most so many a second").fill("8")
            await say_why(page, "Replay 80", "repaired")
            await page.get_by_text(re.compile(r"[1-9]\d* of 80 done")).wait_for()
            await consoles[0].kill()
            await page.get_by_text("The console does not answer").wait_for()
            done = int(rows.sql("SELECT done FROM outbox_operation"))
            assert 0 < done < 80
            await start()
            await page.locator("#state", has_text="interrupted").wait_for()
            await page.get_by_label("From now on").fill("1000")
            await say_why(page, "Go on with it", "the console died")
            await page.locator("#state", has_text="finished").wait_for()
            await page.get_by_text("80 of 80 done").wait_for()
    finally:
        for console in consoles:
            await console.kill()
    assert rows.sql("SELECT count(*), count(DISTINCT id) FROM outbox_message") == "80|80"
    assert rows.sql("SELECT count(*) FROM dead_letter WHERE resolution = 'replayed'") == "80"


async def test_a_session_that_ends_leads_back_to_the_login_and_from_there_to_the_page(
    make_console: MakeConsole, rows: LedgerRows
) -> None:
    rows.dead_letters()
    user = ConsoleUser(name="ada", scrypt=hashed("right"), roles=frozenset({"operator"}))
    async with serve(make_console(users=[user], session=8)) as client, browsing() as visit:
        page = visit.page
        await page.goto(f"{client.base_url}/dead-letters")
        await page.keyboard.type("ada")  # the name has the focus
        await page.keyboard.press("Tab")
        await page.keyboard.type("wrong")
        await page.keyboard.press("Enter")
        await page.get_by_role("alert").get_by_text("do not fit").wait_for()
        await page.get_by_label("Name").fill("ada")
        await page.get_by_label("Password").fill("right")
        await page.keyboard.press("Enter")
        await page.get_by_role("heading", name="Dead letters").wait_for()
        await page.get_by_role("heading", name="Log in").wait_for()  # by itself
        assert page.url.endswith("to=%2Fdead-letters")
        assert await visit.obstacles() == []


HOSTILE = """<script>window.taken=1</script><img src=x onerror="window.taken=2">'"><svg/onload=window.taken=3>"""


async def test_nothing_that_was_stored_runs_in_a_browser(url: str, rows: LedgerRows, by_proxy: As) -> None:
    quoted = "'" + HOSTILE.replace("'", "''") + "'"
    errors = literal([{"type": HOSTILE, "message": HOSTILE, "traceback": HOSTILE, "attempt": 1, "at": HOSTILE[:0]}])
    names = {"consumer": quoted, "queue": quoted, "event_type": quoted, "headers": literal({"correlation_id": HOSTILE})}
    payload = {"payload": literal({HOSTILE: HOSTILE})}
    rows.dead_letters(1, reason=quoted, **names | payload | {"errors": errors.replace('"at": ""', '"on": ""')})
    [delivery] = rows.messages(1, None, 1, **names | payload)
    rows.sql(f"INSERT INTO paused_queue VALUES ({quoted}, now(), {quoted}, {quoted})")
    rows.sql(f"INSERT INTO outbox_operation (kind, about, asked_by, why) VALUES ('x', '{{}}', {quoted}, {quoted})")
    rows.schedule(HOSTILE, paused_at="now()", paused_by=quoted, why=quoted)
    rows.messages(2, None, 1, lane=quoted, due_at="outbox_parked()", **names)
    rows.sql(
        f"INSERT INTO limited_queue (queue, concurrency, limited_by, why) VALUES ({quoted}, 1, {quoted}, {quoted})"
    )
    async with browsing(by_proxy(HOSTILE, "operator", "payload")) as visit:
        page = visit.page
        for path in ("/", "/dead-letters", "/events", f"/events/{delivery}", "/audit", "/operations/1",
                     "/schedules", "/lanes", f"/schedules/run?schedule={quote(HOSTILE)}",
                     f"/lanes/repair?lane={quote(HOSTILE)}",
                     "/dead-letters/discard/many", "/dead-letters/1"):  # fmt: skip
            await page.goto(url + path)
            assert await page.evaluate("window.taken") is None, path
        await page.get_by_text("hidden", exact=True).click()
        await say_why(page, "Show it", HOSTILE)
        assert HOSTILE[:20] in await page.get_by_label("Payload, as JSON").input_value()
        assert await page.evaluate("window.taken") is None
        assert SECRET not in await page.content()
        assert visit.complaints == []
