"""One request is one transaction: a success status means committed, anything else that nothing is stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx

    from tests.api.conftest import Sql

STORED = "SELECT (SELECT count(*) FROM probe) || ' rows, ' || (SELECT count(*) FROM outbox_message) || ' messages'"


async def test_the_response_comes_after_the_commit(client: httpx.AsyncClient, sql: Sql) -> None:
    response = await client.post("/probes", json={"id": 1, "name": "slow"})  # its commit takes half a second
    assert sql(STORED) == "1 rows, 1 messages"
    assert response.status_code == 201


async def test_a_failing_commit_is_no_success(client: httpx.AsyncClient, sql: Sql) -> None:
    response = await client.post("/deferred")
    assert response.status_code == 409
    assert response.json()["code"] == "conflict"
    assert sql(STORED) == "0 rows, 0 messages"


@pytest.mark.parametrize("how", ["commit", "rollback"])
async def test_a_handler_cannot_end_the_requests_transaction(client: httpx.AsyncClient, sql: Sql, how: str) -> None:
    """After a rollback it would answer with success for what is gone."""
    response = await client.post(f"/ends/{how}")
    assert response.status_code == 500
    assert sql(STORED) == "0 rows, 0 messages"


async def test_a_swallowed_database_error_is_no_success(client: httpx.AsyncClient, sql: Sql) -> None:
    response = await client.post("/swallowed")
    assert response.status_code == 500
    assert sql(STORED) == "0 rows, 0 messages"


async def test_a_lost_connection_is_no_success(client: httpx.AsyncClient, sql: Sql) -> None:
    response = await client.post("/killed")
    assert response.status_code == 503
    assert sql(STORED) == "0 rows, 0 messages"


@pytest.mark.parametrize(("what", "status"), [("bug", 500), ("http", 403), ("business", 409)])
async def test_an_exception_rolls_back_what_was_flushed_and_published(
    client: httpx.AsyncClient, sql: Sql, what: str, status: int
) -> None:
    response = await client.post(f"/raising/{what}")
    assert response.status_code == status
    assert sql(STORED) == "0 rows, 0 messages"


async def test_an_event_exists_exactly_where_its_row_does(client: httpx.AsyncClient, sql: Sql) -> None:
    async def place(number: int) -> int:
        return (await client.post("/probes", json={"id": number})).status_code

    statuses = await asyncio.gather(*(place(number % 20) for number in range(60)))
    assert sorted(statuses) == [201] * 20 + [409] * 40
    assert sql("SELECT count(*) FROM probe") == "20"
    published = "SELECT string_agg(payload->>'probe', ',' ORDER BY (payload->>'probe')::int) FROM outbox_message"
    assert sql(published) == sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM probe")
