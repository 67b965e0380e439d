"""A request takes bounded time, and one that was given up leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text

from tests.service.api.problems import assert_problem
from tests.service.api.serving import raw_request, serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from fastapi import FastAPI
    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.service.api.conftest import MakeApp, Sql

OTHERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'api' AND state <> 'idle'
"""


@pytest.fixture
def app(make_app: MakeApp) -> FastAPI:
    return make_app(api={"request_timeout": 0.5})


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(app) as client:
        yield client


async def test_a_request_that_takes_too_long_is_rolled_back(
    client: httpx.AsyncClient, engine: AsyncEngine, sql: Sql
) -> None:
    async with engine.connect() as blocker:
        await blocker.execute(text("LOCK TABLE probe"))
        response = await client.post("/probes", json={"id": 1}, headers={"Idempotency-Key": "k"})
    assert_problem(response, 504, "timeout")
    await until(lambda: sql(OTHERS) == "0", what="the transaction to be gone")
    assert sql("SELECT count(*) FROM probe") == sql("SELECT count(*) FROM idempotency_key") == "0"


async def test_the_connections_of_abandoned_requests_are_usable_again(client: httpx.AsyncClient, sql: Sql) -> None:
    answers = await asyncio.gather(*(client.get("/sleep/60") for _ in range(5)))  # as many as the pool has
    assert {answer.status_code for answer in answers} == {504}
    assert (await client.post("/probes", json={"id": 1})).status_code == 201
    await until(lambda: sql(OTHERS) == "0", what="the other connections to be given back")


async def test_a_request_body_that_never_ends_is_given_up(client: httpx.AsyncClient) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    status, body = await raw_request(client, head)
    assert (status, json.loads(body)["code"]) == (504, "timeout")


async def test_work_after_the_response_is_not_cut_short(app: FastAPI, client: httpx.AsyncClient) -> None:
    assert (await client.get("/background")).status_code == 200
    await until(lambda: getattr(app.state, "worked", False), what="the background task to finish")
