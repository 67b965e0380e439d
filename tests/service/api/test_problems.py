"""Every error is a problem with a stable code, and none shows the inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.service.api.problems import assert_problem
from tests.service.api.serving import raw_request, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    from tests.service.api.conftest import MakeApp


async def test_an_unknown_path(client: httpx.AsyncClient) -> None:
    assert_problem(await client.get("/nowhere"), 404, "not_found")


async def test_a_trailing_slash_is_another_path(client: httpx.AsyncClient) -> None:
    assert_problem(await client.post("/probes/", json={"id": 1}), 404, "not_found")


async def test_a_wrong_method_is_told_the_right_ones(client: httpx.AsyncClient) -> None:
    response = await client.delete("/probes")
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "GET, POST"


async def test_invalid_fields_are_pointed_at(client: httpx.AsyncClient) -> None:
    problem = assert_problem(await client.post("/probes", json={"id": "x"}), 422, "invalid_request")
    assert [(error["pointer"], error["code"]) for error in problem["errors"]] == [("/body/id", "int_parsing")]


async def test_a_long_list_of_errors_is_cut(client: httpx.AsyncClient) -> None:
    response = await client.post("/echo", content=b"[]", headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid_request")
    assert len(response.content) < 2_000


async def test_a_business_error_carries_its_code(client: httpx.AsyncClient) -> None:
    problem = assert_problem(await client.post("/raising/business"), 409, "refused")
    assert (problem["title"], problem["detail"]) == ("Refused", "Not today, señor.")


async def test_an_http_exception(client: httpx.AsyncClient) -> None:
    assert assert_problem(await client.post("/raising/http"), 403, "forbidden")["detail"] == "no"


async def test_a_bug_shows_nothing_of_the_inside(client: httpx.AsyncClient) -> None:
    response = await client.post("/raising/bug")
    assert_problem(response, 500, "internal_error")
    assert "secret" not in response.text
    assert "Traceback" not in response.text


async def test_a_bug_in_a_statement_is_not_the_clients_fault(client: httpx.AsyncClient) -> None:
    assert_problem(await client.post("/divided"), 500, "internal_error")


JSON = {"Content-Type": "application/json"}


async def test_a_body_that_is_no_json(client: httpx.AsyncClient) -> None:
    for body in (b"{nope", b"\xff\xfe", b"[" * 60_000, b'{"id": ' + b"9" * 5_000 + b"}"):
        assert_problem(await client.post("/probes", content=body, headers=JSON), 400, "malformed_request")
    assert_problem(await client.post("/probes", headers=JSON), 422, "invalid_request")


async def test_a_body_of_another_kind(client: httpx.AsyncClient) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        headers = {"Content-Type": media_type} if media_type else {}
        response = await client.post("/probes", content=b'{"id": 1}', headers=headers)
        assert_problem(response, 415, "unsupported_media_type")


async def test_values_that_cannot_be_stored(client: httpx.AsyncClient) -> None:
    bodies: list[dict[str, Any]] = [
        {"id": 1, "name": "a\x00b"},
        {"id": 1, "name": "x" * 201},
        {"id": 2**31},
        {"id": 2**63},
        {"id": 1, "name": "\ud800"},
        {"id": 1, "\ud800": 1},
        {"id": float("nan")},
    ]
    for body in bodies:
        response = await client.post("/probes", content=json.dumps(body).encode(), headers=JSON)
        assert_problem(response, 422, "invalid_request")


class TestSizes:
    """A body has 1,000 bytes at most here."""

    @pytest.fixture
    async def client(self, make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
        async with serve(make_app(api={"max_body_bytes": 1_000})) as client:
            yield client

    @staticmethod
    def body_of(size: int) -> bytes:
        return b'{"a": "' + b"x" * (size - 9) + b'"}'

    async def test_a_body_of_the_size_allowed(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/echo", content=self.body_of(1_000), headers={"Content-Type": "application/json"})
        assert response.status_code == 200

    async def test_an_announced_body_that_is_too_large(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/echo", content=self.body_of(1_001), headers={"Content-Type": "application/json"})
        assert_problem(response, 413, "content_too_large")

    @pytest.mark.parametrize("length", ["1001", "9" * 18])
    async def test_an_announced_body_is_refused_before_it_arrives(self, client: httpx.AsyncClient, length: str) -> None:
        head = f"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n"
        status, body = await raw_request(client, head.encode())
        assert (status, json.loads(body)["code"]) == (413, "content_too_large")

    @pytest.mark.parametrize("path", ["/echo", "/probes"])
    async def test_a_chunked_body_that_is_too_large(self, client: httpx.AsyncClient, path: str) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(11):
                yield b" " * 100

        response = await client.post(path, content=chunks(), headers={"Content-Type": "application/json"})
        assert_problem(response, 413, "content_too_large")
