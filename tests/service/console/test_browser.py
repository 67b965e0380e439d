"""The pages in a real browser: nothing is refused, everybody can use them, and they renew themselves in peace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from service.ledger.ids import new_event_id
from tests.service.api.serving import serve
from tests.service.console.browsing import browsing, needs_browser
from tests.service.console.ledger_rows import literal
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows

pytestmark = [pytest.mark.slow, needs_browser]

LONG = "a_name_without_any_place_to_break_it_" * 3


@pytest.fixture
async def url(make_console: MakeConsole) -> AsyncIterator[str]:
    async with serve(make_console()) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture
def pages(rows: LedgerRows) -> list[str]:
    """Each page, with something on it."""
    rows.dead_letters(3)
    rows.dead_letters(1, error="no route to host", consumer=f"'{LONG}'", queue="'stock'")
    event = new_event_id()
    rows.messages(1, event, 1, errors=literal([{"at": "2026-01-02T03:00:05+00:00", "type": "Boom", "message": LONG}]))
    rows.messages(1, event, 2, consumer="'orders.count'", state="'completed'", completed_at="now()")
    rows.sql("INSERT INTO paused_queue VALUES ('stock', now(), 'ann', 'stocktaking')")
    rows.sql(
        "INSERT INTO outbox_process (id, kind, host, pid, queues, threads, version, seen_at) VALUES "
        "(gen_random_uuid(), 'worker', 'one', 11, '{stock,email}', 8, 'v7', now()), "
        "(gen_random_uuid(), 'relay', 'two', 22, '{}', 0, '', now() - interval '5 minutes')"
    )
    rows.sql(
        "INSERT INTO outbox_operation (kind, about, asked_by, why, state, ids, total, done, seen_at) VALUES "
        f"('replay', '{{\"error\": \"{LONG}\"}}', 'ann', 'repaired', 'stopped', '{{1,2,3}}', 3, 1, now())"
    )
    rows.schedule("nightly")
    rows.schedule(LONG, new_event_id(), paused_at="now()", paused_by="'ann'", why=f"'{LONG}'")
    rows.messages(2, None, 1, lane="'stranded'", due_at="outbox_parked()")
    rows.sql("UPDATE outbox_message SET due_at = outbox_parked() WHERE lane = 'stranded'")
    rows.dead_letters(1, reason=f"'{LONG}'", lane=f"'order:{LONG}'", position="1", blocks="true")
    rows.sql("INSERT INTO limited_queue (queue, concurrency, limited_by) VALUES ('stock', 1, 'ann')")
    return ["/", "/schedules", f"/schedules/resume?schedule={LONG}", "/lanes", "/lanes/repair?lane=stranded",
            "/queues/limit?queue=stock", "/dead-letters", "/dead-letters?state=any", "/dead-letters/1", "/events",
            f"/events/{event}", "/processes", "/operations", "/operations/1", "/audit", "/queues/pause?queue=email",
            "/queues/resume?queue=stock", "/dead-letters/replay/many", "/nowhere"]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_everybody_can_use_every_page(url: str, pages: list[str], by_proxy: As, scheme: str) -> None:
    async with browsing(by_proxy("ann", "operator", "payload"), color_scheme=scheme) as visit:
        for path in pages:
            await visit.page.goto(url + path)
            assert await visit.obstacles() == [], path
        expected = [each for each in visit.complaints if "404 (Not Found)" not in each]
        assert expected == []


async def test_a_phone_shows_every_page_without_scrolling_sideways(url: str, pages: list[str], by_proxy: As) -> None:
    async with browsing(by_proxy("ann", "viewer"), viewport={"width": 375, "height": 700}, is_mobile=True) as visit:
        for path in pages:
            await visit.page.goto(url + path)
            wide = await visit.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 375, path


async def test_a_page_shows_what_has_changed_and_leaves_everything_else_alone(
    url: str, pages: list[str], by_proxy: As, rows: LedgerRows
) -> None:
    async with browsing(by_proxy("ann", "viewer"), viewport={"width": 900, "height": 300}) as visit:
        page = visit.page
        await page.goto(f"{url}/dead-letters")
        await page.get_by_label("Error has").fill("half a wo")
        await page.get_by_role("link", name="1", exact=True).focus()
        await page.evaluate("window.scrollTo(0, 200)")
        await page.evaluate("document.querySelector('#live .scroll').scrollLeft = 40")
        rows.dead_letters(1, error="something new")
        await page.get_by_role("link", name="MailError").nth(2).wait_for()
        await page.get_by_text("something new").first.wait_for()
        assert await page.evaluate("document.activeElement.textContent") == "1"
        assert await page.evaluate("window.scrollY") == 200
        assert await page.get_by_label("Error has").input_value() == "half a wo"
        assert visit.complaints == []


async def test_a_page_holds_still_while_something_is_selected_and_when_it_is_told_to(
    url: str, pages: list[str], by_proxy: As
) -> None:
    async with browsing(by_proxy("ann", "viewer")) as visit:
        page = visit.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))

        async def renews() -> bool:
            """In ten seconds of the page's own clock."""
            asked.clear()
            await page.clock.run_for(10_000)
            await page.evaluate("fetch('/static/icon.svg')")
            await until(lambda: any("icon.svg" in each for each in asked))
            return f"{url}/" in asked

        await page.clock.install()
        await page.goto(f"{url}/")
        await until(renews, what="another look")
        await page.evaluate("window.getSelection().selectAllChildren(document.querySelector('h2'))")
        assert not await renews()
        await page.evaluate("window.getSelection().removeAllRanges()")
        await until(renews, what="another look")
        await page.get_by_role("button", name="Live").click()
        assert not await renews()
        await page.get_by_role("button", name="Stopped").click()
        await until(renews, what="another look")


async def test_without_a_mouse_the_content_is_one_key_away(url: str, pages: list[str], by_proxy: As) -> None:
    async with browsing(by_proxy("ann", "viewer")) as visit:
        page = visit.page
        await page.goto(f"{url}/dead-letters")
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to the content"
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        await (
            page.get_by_role("link", name="no route to host")
            .or_(page.get_by_role("link", name="MailError"))
            .first.focus()
        )
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/dead-letters?*group=*")


async def test_a_console_that_is_gone_is_told(make_console: MakeConsole, by_proxy: As) -> None:
    async with browsing(by_proxy("ann", "viewer")) as visit:
        async with serve(make_console()) as client:
            await visit.page.goto(str(client.base_url))
            assert not await visit.page.get_by_text("The console does not answer").is_visible()
        await visit.page.get_by_text("The console does not answer").wait_for()
