"""What the API tells Prometheus, on a port of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
import pytest
from fastapi import APIRouter, BackgroundTasks

from service.dev.servers import free_port
from service.http.callers import PUBLIC
from tests.servers.scraping import Page, scrape
from tests.service.api.probe import ASLEEP
from tests.service.api.serving import raw_request, serve
from tests.waiting import until

if TYPE_CHECKING:
    from tests.service.api.conftest import MakeApp, Sql

FAILURES = "http_server_background_failures_total"
REQUESTS = "http_server_request_duration_seconds_count"


@pytest.fixture
def port() -> int:
    """For the metrics."""
    return free_port()


async def settled(port: int) -> Page:
    """A page as soon as somebody listens."""
    page = await until(lambda: scrape(port), what="metrics")
    assert isinstance(page, Page)
    return page


async def test_requests_are_counted_by_the_template_of_their_route(make_app: MakeApp, port: int) -> None:
    async with serve(make_app(metrics={"port": port})) as client:
        for number in range(3):
            await client.post(f"/named/x{number}")
        await client.post("/probes", json={"id": "no number"})
        page = await settled(port)
    assert page(REQUESTS, method="POST", route="/named/{name}", status="201") == 3
    assert page(REQUESTS, method="POST", route="/probes", status="422") == 1
    seconds = page("http_server_request_duration_seconds_sum", method="POST", route="/named/{name}", status="201")
    assert seconds is not None
    assert 0 < seconds < 60


async def test_a_router_within_a_router_counts_with_both_prefixes(make_app: MakeApp, port: int) -> None:
    inner, outer = APIRouter(prefix="/inner"), APIRouter(prefix="/outer", dependencies=[PUBLIC])

    @inner.get("/{key}")
    async def get(key: str) -> str:
        return key

    outer.include_router(inner)
    app = make_app(metrics={"port": port})
    app.include_router(outer)
    async with serve(app) as client:
        await client.get("/outer/inner/1")
        page = await settled(port)
    assert page(REQUESTS, method="GET", route="/outer/inner/{key}", status="200") == 1


@pytest.mark.slow
async def test_what_clients_make_up_is_no_label(make_app: MakeApp, port: int) -> None:
    async with serve(make_app(metrics={"port": port})) as client:
        for number in range(50):
            await client.get(f"/unknown/{number}")
            await client.request(("PROPFIND", "MKCOL", "REPORT", "SEARCH", "PURGE")[number % 5], "/probes")
        page = await settled(port)
    assert page(REQUESTS, method="GET", route="other", status="404") == 50
    assert page(REQUESTS, method="other", route="/probes", status="405") == 50
    assert len(page.families["http_server_request_duration_seconds"].samples) < 50


async def test_a_request_is_active_until_its_response_is_sent(make_app: MakeApp, port: int) -> None:
    async with serve(make_app(metrics={"port": port})) as client:
        slow = asyncio.create_task(client.get("/sleep/2"))

        async def used() -> Page | None:
            page = await scrape(port)
            return page if page("db_pool_connections", status="used") == 1 else None

        page = await until(used, what="the request")
        assert page("http_server_active_requests", method="GET") == 1
        await slow
        page = await scrape(port)
    assert page("http_server_active_requests", method="GET") == 0
    assert page("db_pool_connections", status="used") == 0
    assert page("db_pool_connections", status="idle") == 1
    assert page("db_pool_connections", status="free") == 4


async def test_work_after_the_response_is_counted_when_it_fails_and_not_timed(make_app: MakeApp, port: int) -> None:
    app = make_app(metrics={"port": port})
    go_on = asyncio.Event()

    @app.get("/best-effort", dependencies=[PUBLIC])
    async def best_effort(tasks: BackgroundTasks) -> None:
        async def fail() -> None:
            await go_on.wait()
            raise RuntimeError

        tasks.add_task(fail)

    async with serve(app) as client:

        async def shown(name: str, **labels: str) -> bool:
            return bool((await scrape(port))(name, route="/best-effort", **labels))

        assert (await client.get("/best-effort")).status_code == 200
        await until(lambda: shown(REQUESTS, method="GET", status="200"), what="the request, while its work goes on")
        assert not await shown(FAILURES)
        go_on.set()
        await until(lambda: shown(FAILURES), what="the failure")


async def test_code_that_holds_the_loop_shows(make_app: MakeApp, port: int) -> None:
    app = make_app(metrics={"port": port})

    @app.get("/blocks", dependencies=[PUBLIC])
    async def block() -> None:
        time.sleep(1.2)  # noqa: ASYNC251

    async with serve(app) as client:
        await settled(port)
        await client.get("/blocks")
        page = await scrape(port)
    lag = page("event_loop_lag_seconds", process="api")
    assert lag is not None
    assert lag > 1


async def test_who_waits_in_vain_for_a_connection_is_counted_answered_503_and_told_of_now_and_then(
    make_app: MakeApp, port: int, sql: Sql, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve(make_app(database={"pool_size": 1, "pool_timeout": 0.1}, metrics={"port": port})) as client:
        assert (await settled(port))("db_pool_timeouts_total", process="api") == 0
        busy = asyncio.create_task(client.get("/sleep/60"))
        await until(lambda: sql(f"SELECT count(*) {ASLEEP}") == "1")
        for _ in range(3):
            response = await client.get("/probes")
            assert (response.status_code, int(response.headers["Retry-After"]) > 0) == (503, True)
        assert (await scrape(port))("db_pool_timeouts_total", process="api") == 3
        sql(f"SELECT pg_cancel_backend(pid) {ASLEEP}")
        await busy
    assert capsys.readouterr().out.count("database.pool_exhausted") == 1


async def test_no_other_path_and_method_answers(make_app: MakeApp, port: int) -> None:
    async with serve(make_app(metrics={"port": port})) as client:
        await settled(port)
        assert (await client.get("/metrics")).status_code == 404
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as other:
            for path in ("/", "/metrics/", "/metricsx", "/health/live", "/docs"):
                assert (await other.get(path)).status_code == 404
            assert (await other.get("/metrics?name=x")).status_code == 200
            assert (await other.post("/metrics")).status_code == 405
            head, _ = await raw_request(other, b"GET /metrics HTTP/1.1\r\n\r\n")
            assert head == 200


async def test_hostile_scrapers_hold_nothing_up(make_app: MakeApp, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.telemetry.metrics_endpoint.WITHIN", 2)
    async with serve(make_app(metrics={"port": port})) as client:
        await settled(port)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        for _, writer in silent[:10]:
            writer.write(b"GET /metr")
        too_long_reader, too_long = await asyncio.open_connection("127.0.0.1", port)
        too_long.write(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 100_000)
        assert (await client.get("/health/live")).status_code == 200
        async with asyncio.timeout(60):
            for reader, _ in (*silent, (too_long_reader, too_long)):
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
        assert (await scrape(port))("event_loop_lag_seconds", process="api") is not None
        for _, writer in (*silent, (None, too_long)):
            writer.close()


async def test_a_port_that_is_taken_stops_nothing_and_is_tried_again(
    make_app: MakeApp, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.telemetry.metrics_endpoint._TRY_AGAIN", 0.1)
    async with serve(make_app(metrics={"port": port})) as first:
        await settled(port)
        await first.get("/unknown")
        async with serve(make_app(metrics={"port": port})) as second:
            assert (await second.get("/health/live")).status_code == 200
            page = await scrape(port)
            assert page(REQUESTS, method="GET", route="other", status="404") == 1
    async with serve(make_app(metrics={"port": port})):
        assert (await settled(port))(REQUESTS, method="GET", route="other", status="404") is None


@pytest.mark.slow
def test_off_costs_nothing(environment: dict[str, str]) -> None:
    program = """
import sys
from service.api import create_app
from relay.process import loop
from service.settings import load_settings
app = create_app()
assert not load_settings().metrics.port
assert not [each for each in app.user_middleware if "metrics" in each.cls.__module__]
unused = ("prometheus", "service.telemetry.metrics")
print([name for name in sys.modules if name.startswith(unused)])
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
