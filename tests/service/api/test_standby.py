"""A success is on the synchronous standby, also when the answer is given from what was only read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from service.dev.postgres import Postgres
from tests.servers.real_servers import copy_of
from tests.servers.standby import Standby
from tests.service.api.probe import SCHEMA
from tests.service.api.serving import serve
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.servers.real_servers import Where
    from tests.service.api.conftest import MakeApp

pytestmark = pytest.mark.slow

STORED = "SELECT (SELECT count(*) FROM probe) || ' rows, ' || (SELECT count(*) FROM outbox_message) || ' messages'"
KEY = {"Idempotency-Key": "k"}


@pytest.fixture
def primary(servers: Where, server_folder: Path) -> Iterator[Postgres]:
    """A PostgreSQL with the migrated database."""
    data_dir = copy_of(Path(servers.seed), server_folder / "primary")
    with Postgres(data_dir, durable=False, settings={"synchronous_commit": "on"}, tcp=True) as primary:
        primary.sql(SCHEMA, "service")
        yield primary


@pytest.fixture
def standby(primary: Postgres, server_folder: Path) -> Iterator[Standby]:
    """Its standby; commits on the primary wait for it from now on."""
    with Standby(primary, server_folder / "standby") as standby:
        primary.sql("ALTER SYSTEM SET synchronous_standby_names = '*'")
        primary.sql("SELECT pg_reload_conf()")
        yield standby


@pytest.mark.parametrize("path", ["/probes", "/accepted"])
async def test_a_repeated_request_succeeds_when_the_standby_has_the_first(
    make_app: MakeApp, primary: Postgres, standby: Standby, path: str
) -> None:
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
