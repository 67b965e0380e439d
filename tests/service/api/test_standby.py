"""A success is on the synchronous standby, also when the answer is given from what was only read."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from tests.servers.standby import Standby, synchronous_pair
from tests.service.api.probe import SCHEMA
from tests.service.api.serving import serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx

    from service.dev.postgres import Postgres
    from tests.servers.real_servers import Where
    from tests.service.api.conftest import MakeApp

pytestmark = pytest.mark.slow

STORED = "SELECT (SELECT count(*) FROM probe) || ' rows, ' || (SELECT count(*) FROM outbox_message) || ' messages'"
KEY = {"Idempotency-Key": "k"}


@pytest.fixture
def pair(servers: Where, server_folder: Path) -> Iterator[tuple[Postgres, Standby]]:
    """Two PostgreSQLs; the second is a synchronous standby of the first."""
    with synchronous_pair(servers, server_folder) as pair:
        yield pair


@pytest.mark.parametrize("path", ["/probes", "/accepted"])
async def test_a_repeated_request_succeeds_when_the_standby_has_the_first(
    make_app: MakeApp, pair: tuple[Postgres, Standby], path: str
) -> None:
    primary, standby = pair
    primary.sql(SCHEMA, "service")
    headers = KEY if path == "/probes" else {}

    async def post(client: httpx.AsyncClient) -> int:
        return (await client.post(path, json={"id": 1}, headers=headers)).status_code

    url = SecretStr(primary.url("service"))
    async with serve(make_app(database={"url": url}, api={"request_timeout": 3})) as client:
        assert (await client.post("/probes", json={"id": 0})).status_code == 201
        await asyncio.to_thread(standby.stop)
        assert await post(client) == 504
        stored = await until(lambda: _stored(primary, before="1 rows, 1 messages"), what="the commit to be given up")
        for _ in range(2):
            assert await post(client) == 504
        await asyncio.to_thread(standby.start)
        await until(lambda: _succeeds(post, client), timeout=40, what="the standby to confirm")
    await asyncio.to_thread(primary.kill)
    await asyncio.to_thread(standby.promote)
    assert standby.sql(STORED, "service") == stored


def _stored(primary: Postgres, before: str) -> str:
    now = primary.sql(STORED, "service")
    return "" if now == before else now


async def _succeeds(post: object, client: httpx.AsyncClient) -> bool:
    return bool(await post(client) == 201)  # type: ignore[operator]
