"""Every socket to PostgreSQL and to the broker ends when the other host is silently gone, within seconds.

What is read here is what the kernel has, from the sockets that the shipped commands have really opened.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import sys
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from relay.brokers.rabbitmq_channel import OneChannel
from relay.brokers.redis_sender import RedisSender
from service.dev.places import ROOT
from service.dev.valkey import Valkey
from service.network.sockets import silence_options
from service.settings import BrokerSettings
from service.worker.dramatiq_broker import make_broker
from tests.proof.ledger import domain
from tests.servers.real_servers import another_postgres
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.proof.rabbitmq.server import Rabbitmq
    from tests.servers.processes import Processes, Started
    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow

LONGEST = 15
_GETFD = 438  # pidfd_getfd, the same on every architecture


def _bound(sock: socket.socket) -> dict[str, int]:
    """Seconds until this socket notices: of an idle connection, and of one with something unconfirmed."""
    read = {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in silence_options(10)}
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle = read.get("TCP_KEEPIDLE") or read["TCP_KEEPALIVE"]
    bounds = {"idle": idle + read["TCP_KEEPINTVL"] * read["TCP_KEEPCNT"]}
    return bounds | ({"busy": read["TCP_USER_TIMEOUT"] // 1000} if "TCP_USER_TIMEOUT" in read else {})


def _short_enough(sock: socket.socket) -> bool:
    return all(0 < bound <= LONGEST for bound in _bound(sock).values())


def _sockets(process: psutil.Process, ports: set[int]) -> Iterator[tuple[int, socket.socket]]:
    """Duplicates of a process's connections to these ports."""
    handle = os.pidfd_open(process.pid)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for found in process.net_connections("tcp"):
            if found.status == psutil.CONN_ESTABLISHED and found.raddr.port in ports:
                copy = libc.syscall(_GETFD, handle, found.fd, 0)
                if copy < 0:
                    pytest.skip(f"this kernel lets no other process read a socket: {os.strerror(ctypes.get_errno())}")
                with closing(socket.socket(fileno=copy)) as sock:
                    yield found.raddr.port, sock
    finally:
        os.close(handle)


@pytest.fixture
def own_tcp_valkey(server_folder: Path) -> Iterator[Valkey]:
    """A Valkey on a port."""
    with Valkey(server_folder / "valkey", tcp=True) as valkey:
        yield valkey


@pytest.fixture
def over_tcp(
    environment: dict[str, str], servers: Where, server_folder: Path, own_tcp_valkey: Valkey
) -> Iterator[tuple[int, int]]:
    """Ports of a PostgreSQL and a Valkey that the processes are to use."""
    with another_postgres(servers, server_folder / "postgres", tcp=True) as postgres:
        postgres.sql(domain.SCHEMA, "service")
        environment |= {"DATABASE__URL": postgres.url("service"), "BROKER__URL": own_tcp_valkey.url}
        assert own_tcp_valkey.port is not None
        yield postgres.port, own_tcp_valkey.port


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shows another process's sockets")
async def test_every_socket_of_the_shipped_commands(over_tcp: tuple[int, int], processes: Processes) -> None:
    ports = set(over_tcp)
    api, worker, relay = await asyncio.gather(
        processes.api("tests.proof.ledger.release.app:create_app", RELEASE="older"),
        processes.worker("tests.proof.ledger.release.app:setup_broker", RELEASE="older"),
        processes.relay(),
    )
    async with httpx.AsyncClient(base_url=api.url, timeout=30) as client:
        assert (await client.post("/releases")).is_success

    def looked_at(started: Started) -> dict[int, list[bool]]:
        leader = psutil.Process(started.process.pid)
        seen: dict[int, list[bool]] = {}
        for process in (leader, *leader.children(recursive=True)):
            for port, sock in _sockets(process, ports):
                seen.setdefault(port, []).append(_short_enough(sock))
        return seen

    for started, expected in ((api, ports - {over_tcp[1]}), (worker, ports), (relay, ports)):
        opened = partial(looked_at, started)
        same = partial(lambda look, keys: look().keys() == keys, opened, expected)
        await until(same, timeout=30, what=f"connections of {started.log}")
        assert all(all(each) for each in opened().values()), started.log


async def test_redis_in_this_process(own_tcp_valkey: Valkey) -> None:
    settings = BrokerSettings(url=SecretStr(own_tcp_valkey.url))
    sender, broker = RedisSender(settings), make_broker(settings, [])
    await sender.ping()
    ours = sender._client.connection_pool._available_connections[0]
    assert ours._writer is not None
    assert _short_enough(ours._writer.get_extra_info("socket"))
    client: Any = broker.client  # type: ignore[attr-defined]
    with client.pubsub() as doorbell:
        doorbell.subscribe("any")
        assert _short_enough(doorbell.connection._sock)
    await sender.close()
    broker.close()


async def test_rabbitmq(rabbitmq: Rabbitmq) -> None:
    settings = BrokerSettings(url=SecretStr(rabbitmq.url))
    line = OneChannel(settings)
    await line.open()
    writer = line._transport._writer
    assert writer is not None
    assert _short_enough(writer.get_extra_info("socket"))
    await line.close()
    broker = make_broker(settings, [])
    connection = await asyncio.to_thread(lambda: broker.connection)  # type: ignore[attr-defined]
    assert _short_enough(connection._impl._transport._sock)
    broker.close()


def test_nobody_connects_to_postgresql_in_another_way() -> None:
    """TLS, hosts and silence are seen to in one place."""
    sources = [path for room in ("service", "relay", "migrations") for path in (ROOT / room).rglob("*.py")]
    own = {path for path in sources if "dev" not in path.parts and "asyncpg.connect(" in path.read_text()}
    assert own == {ROOT / "service" / "database" / "driver.py"}
