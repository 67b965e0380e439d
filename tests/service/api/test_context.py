"""A request's ids reach its events and its log lines, and every response carries the security headers."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import pytest
import structlog

from service.telemetry.logs import request_headers
from tests.service.api.serving import serve

if TYPE_CHECKING:
    import httpx

    from tests.service.api.conftest import MakeApp, Sql

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
EVENT_HEADERS = "SELECT headers->>'correlation_id' || ' ' || coalesce(headers->>'traceparent', '-') FROM outbox_message"


async def test_given_ids_come_back_and_reach_the_event(client: httpx.AsyncClient, sql: Sql) -> None:
    given = {"X-Correlation-ID": "order-form/42", "traceparent": TRACEPARENT}
    response = await client.post("/probes", json={"id": 1}, headers=given)
    assert response.headers["X-Correlation-ID"] == "order-form/42"
    assert sql(EVENT_HEADERS) == f"order-form/42 {TRACEPARENT}"


async def test_an_id_is_made_where_none_is_usable(client: httpx.AsyncClient, sql: Sql) -> None:
    for number, given in enumerate((None, "two words", "x" * 129, 'quote"')):
        headers = {"X-Correlation-ID": given} if given else {}
        response = await client.post("/probes", json={"id": number}, headers=headers | {"traceparent": "nonsense"})
        made = response.headers["X-Correlation-ID"]
        assert str(UUID(made)) == made
        assert sql(f"{EVENT_HEADERS} ORDER BY id DESC LIMIT 1") == f"{made} -"


async def test_a_tracestate_that_could_steer_a_terminal_is_dropped(client: httpx.AsyncClient, sql: Sql) -> None:
    fine = "vendor=a1,other=b 2"
    for number, (given, kept) in enumerate([(fine.encode(), fine), (b"a=\x9b2J", "")]):
        headers = [(b"traceparent", TRACEPARENT.encode()), (b"tracestate", given)]
        assert (await client.post("/probes", json={"id": number}, headers=headers)).is_success
        assert sql("SELECT headers->>'tracestate' FROM outbox_message ORDER BY id DESC LIMIT 1") == kept


@pytest.mark.parametrize(
    ("given", "kept"),
    [("vendor=a,b=1", True), ("a=\x1b[2J", False), ("a=\xe4", False), ("", False), ("x" * 513, False)],
)
def test_a_tracestate_is_printable(given: str, kept: bool) -> None:
    headers = request_headers({"traceparent": TRACEPARENT, "tracestate": given})
    assert headers.get("tracestate") == (given if kept else None)


async def test_every_response_carries_the_security_headers(client: httpx.AsyncClient) -> None:
    expected = {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    }
    for request in ("GET /health/live", "GET /lost", "DELETE /probes", "POST /raising/bug", "POST /probes"):
        response = await client.request(*request.split())
        assert {name: response.headers.get(name) for name in expected} == expected, request
        assert "X-Correlation-ID" in response.headers, request


async def test_the_documentation_may_load_its_scripts(client: httpx.AsyncClient) -> None:
    response = await client.get("/docs")
    assert response.status_code == 200
    assert "Content-Security-Policy" not in response.headers


async def test_one_log_line_for_each_request(make_app: MakeApp) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        async with serve(make_app()) as client:
            await client.post("/probes", json={"id": 2}, headers={"X-Correlation-ID": "first"})
            await client.post("/raising/bug", headers={"X-Correlation-ID": "second"})
    lines = [line for line in logs if line["event"] == "http.request"]
    shown = [(line["correlation_id"], line["method"], line["path"], line["status"]) for line in lines]
    assert shown == [("first", "POST", "/probes", 201), ("second", "POST", "/raising/bug", 500)]
    assert all(line["duration_ms"] > 0 for line in lines)
    failures = [line for line in logs if line["event"] == "http.unhandled"]
    assert [line["correlation_id"] for line in failures] == ["second"]
