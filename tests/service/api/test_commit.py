"""One request is one transaction: a success status means committed, anything else that nothing is stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.service.api.probe import ENDINGS
from tests.service.api.serving import serve
from tests.waiting import until

if TYPE_CHECKING:
    import httpx

    from tests.service.api.conftest import MakeApp, Sql

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


@pytest.mark.parametrize("late", [True, False], ids=["fails", "goes on"])
@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "pending"])
async def test_a_handler_cannot_end_the_requests_transaction(
    client: httpx.AsyncClient, sql: Sql, flush: bool, late: bool
) -> None:
    """After a rollback it would answer with success for what is gone, after a commit with failure for what is there."""
    for how in ENDINGS:
        response = await client.post(f"/ends/{how}", params={"flush": flush, "late": late})
        assert (response.status_code, sql(STORED)) == (500, "0 rows, 0 messages"), how
    assert (await client.post("/probes", json={"id": 3})).status_code == 201


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "pending"])
async def test_whoever_swallows_the_refusal_has_a_whole_transaction_or_none(
    client: httpx.AsyncClient, sql: Sql, flush: bool
) -> None:
    kept = set()
    for how in ENDINGS:
        response = await client.post(f"/ends/{how}", params={"flush": flush, "swallow": True})
        if response.status_code == 201:
            kept.add(how)
            assert sql(STORED) == ("1 rows, 2 messages" if flush else "0 rows, 1 messages"), how
            sql("TRUNCATE probe, outbox_message")
        else:
            assert (response.status_code, sql(STORED)) == (500, "0 rows, 0 messages"), how
    assert {"commit", "close", "begin", "COMMIT"} <= kept


async def test_whoever_ended_the_transaction_finds_out_why_it_failed(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in ("transaction.rollback", "driver several", "another one"):
        await client.post(f"/ends/{how}", params={"flush": True})
        said = capsys.readouterr().out + caplog.text
        assert "TransactionError: the transaction was committed or rolled back inside its block" in said, how


@pytest.mark.parametrize("how", ["at once", "in a savepoint", "after a savepoint"])
async def test_a_published_event_cannot_be_thrown_out_of_the_session(
    client: httpx.AsyncClient, sql: Sql, how: str
) -> None:
    response = await client.post(f"/forgets/{how}")
    assert response.status_code == 201
    assert sql(STORED) == "0 rows, 1 messages"


async def test_what_a_savepoint_undid_is_gone_and_nothing_else(client: httpx.AsyncClient, sql: Sql) -> None:
    assert (await client.post("/undone")).status_code == 201
    assert sql("SELECT payload->>'probe' FROM outbox_message") == "1"
    assert sql(STORED) == "0 rows, 1 messages"


async def test_a_session_that_was_kept_takes_nothing_when_the_request_is_over(make_app: MakeApp, sql: Sql) -> None:
    app = make_app()
    async with serve(app) as client:
        assert (await client.post("/afterwards")).status_code == 201
        refused = await until(lambda: getattr(app.state, "refused", ""), what="the background task to try")
    assert "the session is closed" in refused
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
    at_once = asyncio.Semaphore(8)  # none of them is to wait for a connection in vain

    async def place(number: int) -> int:
        async with at_once:
            return (await client.post("/probes", json={"id": number})).status_code

    statuses = await asyncio.gather(*(place(number % 5 + number // 15 * 5) for number in range(60)))
    assert sorted(statuses) == [201] * 20 + [409] * 40
    assert sql("SELECT count(*) FROM probe") == "20"
    published = "SELECT string_agg(payload->>'probe', ',' ORDER BY (payload->>'probe')::int) FROM outbox_message"
    assert sql(published) == sql("SELECT string_agg(id::text, ',' ORDER BY id) FROM probe")
