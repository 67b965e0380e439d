"""Every open connection dies without a word, as when an address moves; what is opened afterwards is well."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from service.dev.valkey import Valkey
from tests.proof.connections.namespace import Namespace
from tests.proof.ledger import domain
from tests.servers.real_servers import another_postgres
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers.processes import Processes, Started
    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    with made.entered():
        yield made


def _own_ports(started: Started, servers: set[int]) -> set[int]:
    leader = psutil.Process(started.process.pid)
    found = (each for process in (leader, *leader.children(recursive=True)) for each in process.net_connections("tcp"))
    return {each.laddr.port for each in found if each.status == psutil.CONN_ESTABLISHED and each.raddr.port in servers}


async def test_the_work_goes_on(
    namespace: Namespace, environment: dict[str, str], servers: Where, server_folder: Path, processes: Processes
) -> None:
    """Without an option, what waits for an answer waits as long as a statement may, and what only listens for ever."""
    with (
        another_postgres(servers, server_folder / "postgres", tcp=True) as postgres,
        Valkey(server_folder / "valkey", tcp=True) as valkey,
    ):
        postgres.sql(domain.SCHEMA, "service")
        environment |= {"DATABASE__URL": postgres.url("service"), "BROKER__URL": valkey.url, "OUTBOX__LEASE": "30"}
        api, *others = await asyncio.gather(
            processes.api("tests.proof.ledger.release.app:create_app", RELEASE="older"),
            processes.worker("tests.proof.ledger.release.app:setup_broker", RELEASE="older"),
            processes.relay(),
        )

        def waiting() -> str:
            return postgres.sql("SELECT count(*) FROM outbox_message WHERE state <> 'completed'", "service")

        async with httpx.AsyncClient(base_url=api.url, timeout=60) as client:
            assert (await client.post("/releases")).is_success
            await until(lambda: waiting() == "0", timeout=60, every=0.2)
            assert valkey.port is not None
            namespace.lose(set().union(*(_own_ports(each, {postgres.port, valkey.port}) for each in (api, *others))))
            began = asyncio.get_running_loop().time()

            async def posted() -> bool:
                return (await client.post("/releases")).is_success

            await until(posted, timeout=40, every=0.5)
            await until(lambda: waiting() == "0", timeout=40, every=0.2, what="the hand-over")
            print(f"the work went on {asyncio.get_running_loop().time() - began:.1f} s after all was silent")
        await processes.stop()
