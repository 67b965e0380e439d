"""A database that is away or busy is 503 with Retry-After, and the API recovers by itself."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter
from typing import TYPE_CHECKING

from pydantic import SecretStr
from sqlalchemy import make_url

from service.api import create_app
from service.dev.postgres import psql
from tests.servers.proxy import Link, proxy, socket_of
from tests.service.api.probe import ASLEEP, SCHEMA, router
from tests.service.api.problems import assert_problem
from tests.service.api.serving import serve
from tests.waiting import until

if TYPE_CHECKING:
    import httpx

    from service.dev.postgres import Postgres
    from service.settings import Settings
    from tests.servers.real_servers import Where
    from tests.service.api.conftest import MakeApp, Sql


def assert_away(response: httpx.Response) -> None:
    assert_problem(response, 503, "database_unavailable")
    assert int(response.headers["Retry-After"]) > 0


async def test_nothing_listens(make_app: MakeApp) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = SecretStr(f"postgresql://user:hidden@127.0.0.1:{reserved.getsockname()[1]}/service")
        async with serve(make_app(database={"url": url})) as client:
            for path in ("/probes", "/raising/bug"):
                response = await client.post(path, json={"id": 1})
                assert_away(response)
                assert "hidden" not in response.text
            assert_away(await client.get("/health/ready"))
            assert (await client.get("/health/live")).status_code == 200


async def test_a_name_that_does_not_resolve_and_a_database_that_does_not_exist(
    make_app: MakeApp, database_url: str
) -> None:
    for url in ("postgresql://nowhere.invalid/service", database_url.replace("/test_", "/missing_")):
        async with serve(make_app(database={"url": SecretStr(url)})) as client:
            assert_away(await client.post("/probes", json={"id": 1}))


async def test_a_server_that_does_not_answer(make_app: MakeApp) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = SecretStr(f"postgresql://user@127.0.0.1:{silent.getsockname()[1]}/service")
        async with serve(make_app(database={"url": url, "connect_timeout": 0.3})) as client:
            assert_away(await client.post("/probes", json={"id": 1}))


async def test_no_host_takes_writes(make_app: MakeApp, sql: Sql, database_url: str) -> None:
    """As in the moment of a failover in which all that answer are standbys."""
    name = sql("SELECT current_database()")
    sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    url = SecretStr(f"{database_url}&target_session_attrs=read-write")
    async with serve(make_app(database={"url": url})) as client:
        assert_away(await client.post("/probes", json={"id": 1}))


async def test_every_connection_is_busy(make_app: MakeApp, sql: Sql) -> None:
    async with serve(make_app(database={"pool_size": 1, "pool_timeout": 0.2})) as client:
        busy = asyncio.create_task(client.get("/sleep/60"))
        await until(lambda: sql(f"SELECT count(*) {ASLEEP}") == "1")
        assert_away(await client.post("/probes", json={"id": 1}))
        sql(f"SELECT pg_cancel_backend(pid) {ASLEEP}")
        await busy
        assert (await client.post("/probes", json={"id": 1})).status_code == 201


async def test_a_statement_takes_too_long(make_app: MakeApp) -> None:
    async with serve(make_app(database={"statement_timeout": 0.2})) as client:
        assert_away(await client.get("/sleep/5"))


async def test_the_database_goes_and_comes_back(settings: Settings, own_postgres: Postgres) -> None:
    own_postgres.sql(SCHEMA, "service")
    database = settings.database.model_copy(update={"url": SecretStr(own_postgres.url("service"))})
    app = create_app(settings.model_copy(update={"database": database}))
    app.include_router(router)
    async with serve(app) as client:
        assert (await client.post("/probes", json={"id": 1})).status_code == 201
        own_postgres.kill()
        for _ in range(3):  # the first finds its connection broken, the next cannot connect
            assert_away(await client.post("/probes", json={"id": 2}))
        own_postgres.start()

        await until(lambda: _stores(client, 2), what="the API to recover")
    assert own_postgres.sql("SELECT count(*) FROM probe", "service") == "2"


async def test_a_connection_that_is_reset_at_any_moment(make_app: MakeApp, database_url: str) -> None:
    """While it is made, while it is set up, and at each statement of a request."""
    async with proxy(socket_of(database_url)) as network:
        url = f"postgresql://postgres@127.0.0.1:{network.port}/{make_url(database_url).database}"
        async with serve(make_app(database={"url": SecretStr(url)})) as client:
            reached = 0
            for last in itertools.count():
                sent: Counter[Link] = Counter()

                async def reset_at_last(
                    link: Link, chunk: bytes, last: int = last, sent: Counter[Link] = sent
                ) -> bytes:
                    sent[link] += 1
                    if sent[link] > last:
                        link.reset()
                    return chunk

                network.request = reset_at_last
                response = await client.post("/probes", json={"id": last})
                if response.status_code == 201:
                    break
                assert_away(response)
                reached = last
            network.allow_all()
            await until(lambda: _stores(client, 1_000))
    assert reached >= 5


_SESSIONS = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'api'"


async def test_connections_that_were_ended_while_idle_are_not_used(client: httpx.AsyncClient, sql: Sql) -> None:
    assert (await client.post("/probes", json={"id": 1})).status_code == 201
    sql(f"SELECT pg_terminate_backend(pid) {_SESSIONS}")
    await until(lambda: sql(f"SELECT count(*) {_SESSIONS}") == "0")
    assert (await client.post("/probes", json={"id": 2})).status_code == 201


async def test_a_server_that_only_reads_is_left_once_it_does_more(
    client: httpx.AsyncClient, servers: Where, settings: Settings
) -> None:
    """A session begun on a standby, or under a role that may only read, stays so for good."""
    role = f'ALTER ROLE postgres IN DATABASE "{make_url(settings.database.dsn).database}"'
    psql(servers.postgres, f"{role} SET default_transaction_read_only = on")
    for _ in range(3):
        assert_away(await client.post("/probes", json={"id": 1}))
    psql(servers.postgres, f"{role} RESET ALL")
    await until(lambda: _stores(client, 1))


async def test_timeouts_of_the_role_end_nothing(
    client: httpx.AsyncClient, servers: Where, settings: Settings, sql: Sql
) -> None:
    role = f'ALTER ROLE postgres IN DATABASE "{make_url(settings.database.dsn).database}"'
    known = int(sql("SHOW server_version_num")) >= 170_000
    for name in ("idle_session_timeout", *(("transaction_timeout",) if known else ())):
        psql(servers.postgres, f"{role} SET {name} = '1s'")
    assert (await client.get("/sleep/1.5")).status_code == 200
    backend = sql(f"SELECT pid {_SESSIONS}")
    await asyncio.sleep(1.5)  # idle
    assert (await client.post("/probes", json={"id": 2})).status_code == 201
    assert sql(f"SELECT pid {_SESSIONS}") == backend


async def _stores(client: httpx.AsyncClient, id_: int) -> bool:
    return (await client.post("/probes", json={"id": id_})).status_code == 201
