"""Live says that the process answers; ready, that the database is there and migrated."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from tests.service.api.problems import assert_problem
from tests.service.api.serving import serve

if TYPE_CHECKING:
    import httpx

    from tests.service.api.conftest import MakeApp, Sql


async def test_ready_and_live(client: httpx.AsyncClient) -> None:
    for path in ("/health/live", "/health/ready"):
        response = await client.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "change",
    [
        "DROP TABLE alembic_version",
        "TRUNCATE alembic_version",
        "DELETE FROM alembic_version WHERE version_num LIKE 'ledger%'",
        "UPDATE alembic_version SET version_num = 'ledger_0001' WHERE version_num LIKE 'ledger%'",
    ],
)
async def test_a_database_that_is_not_migrated(client: httpx.AsyncClient, sql: Sql, change: str) -> None:
    sql(change)
    assert_problem(await client.get("/health/ready"), 503, "not_migrated")


async def test_a_database_that_is_ahead_of_this_code(client: httpx.AsyncClient, sql: Sql) -> None:
    sql("UPDATE alembic_version SET version_num = 'ledger_9999' WHERE version_num LIKE 'ledger%'")
    assert (await client.get("/health/ready")).status_code == 200


async def test_a_database_that_does_not_answer_in_time(make_app: MakeApp) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = SecretStr(f"postgresql://user:hidden@127.0.0.1:{silent.getsockname()[1]}/service")
        async with serve(make_app(database={"url": url, "connect_timeout": 60})) as client:
            started = time.monotonic()
            response = await client.get("/health/ready")
            assert time.monotonic() - started < 30
            assert_problem(response, 503, "database_unavailable")
            assert "hidden" not in response.text
            assert "127.0.0.1" not in response.text
            assert (await client.get("/health/live")).status_code == 200
