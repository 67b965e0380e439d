"""Whatever keeps a whole Valkey from taking messages is the broker's fault, and no queue's."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import redis.asyncio
from pydantic import SecretStr

from relay.brokers.redis_sender import RedisSender
from relay.brokers.sender import BrokerUnavailableError
from service.dev.valkey import Valkey
from service.ledger.message import DueDelivery
from service.settings import BrokerSettings
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@asynccontextmanager
async def sender(url: str) -> AsyncIterator[RedisSender]:
    opened = RedisSender(BrokerSettings(url=SecretStr(url)))
    try:
        yield opened
    finally:
        await opened.close()


async def publish(sender: RedisSender) -> None:
    await sender.hand_over("ledger", [DueDelivery(str(uuid4()), "ledger.react", None)], uuid4().hex)


async def is_blamed(sender: RedisSender) -> None:
    """The broker is at fault for a batch, and says itself that it would take none."""
    with pytest.raises(BrokerUnavailableError):
        await publish(sender)
    with pytest.raises(BrokerUnavailableError):
        await sender.ping()


async def is_well(sender: RedisSender) -> None:
    await sender.ping()
    await publish(sender)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        (("CONFIG", "SET", "requirepass", "secret"), ("CONFIG", "SET", "requirepass", "")),
        (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
    ],
    ids=["OOM", "READONLY", "NOAUTH", "NOREPLICAS"],
)
async def test_a_server_that_takes_nothing(own_valkey: Valkey, fault: tuple[str, ...], cure: tuple[str, ...]) -> None:
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client, sender(own_valkey.url) as ours:
        await client.execute_command(*fault)
        await is_blamed(ours)
        await client.execute_command(*cure)
        await is_well(ours)


async def test_a_replica_without_its_primary(own_valkey: Valkey) -> None:
    """MASTERDOWN"""
    async with redis.asyncio.Redis.from_url(own_valkey.url) as client, sender(own_valkey.url) as ours:
        await client.execute_command("CONFIG", "SET", "replica-serve-stale-data", "no")
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")
        await is_blamed(ours)
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await is_well(ours)


async def test_a_wrong_password(server_folder: Path) -> None:
    with Valkey(server_folder / "valkey", tcp=True) as valkey:
        async with sender(f"redis://:wrong@127.0.0.1:{valkey.port}/0") as ours:
            await is_blamed(ours)
        async with sender(valkey.url) as ours:
            await is_well(ours)


async def test_a_server_that_cannot_save(server_folder: Path) -> None:
    """MISCONF"""
    folder = server_folder / "gone"
    folder.mkdir()
    with Valkey(server_folder / "valkey", settings={"enable-protected-configs": "yes"}) as valkey:
        async with redis.asyncio.Redis.from_url(valkey.url) as client, sender(valkey.url) as ours:
            await client.config_set("dir", str(folder))
            await client.config_set("save", "3600 1000000")
            folder.rmdir()
            await client.bgsave()

            async def failed() -> bool:
                found: dict[str, Any] = await client.info("persistence")
                return bool(found["rdb_last_bgsave_status"] == "err")

            await until(failed)
            await is_blamed(ours)
            await client.config_set("stop-writes-on-bgsave-error", "no")
            await is_well(ours)


@pytest.mark.slow
async def test_a_server_that_is_loading_its_data(server_folder: Path) -> None:
    slow = {"key-load-delay": "30000", "loading-process-events-interval-bytes": "1024"}  # 30 ms for each key
    valkey = Valkey(server_folder / "valkey", persistent=True)
    with valkey:
        async with redis.asyncio.Redis.from_url(valkey.url) as client:
            for number in range(100):
                await client.set(f"key-{number}", os.urandom(2_000))
            await client.bgrewriteaof()  # it answers nobody while it reads the commands, only while it reads a snapshot

            async def rewritten() -> bool:
                found: dict[str, Any] = await client.info("persistence")
                return bool(found["aof_base_size"] > 100)

            await until(rewritten)
        valkey.settings = slow
        valkey.stop()
        starting = asyncio.create_task(asyncio.to_thread(valkey.start))
        async with sender(valkey.url) as ours:
            await until(lambda: is_loading(valkey.url))
            await is_blamed(ours)
            await starting
            await is_well(ours)


async def is_loading(url: str) -> bool:
    async with redis.asyncio.Redis.from_url(url) as client:
        try:
            await client.ping()
        except redis.exceptions.BusyLoadingError:
            return True
        except redis.exceptions.ConnectionError:
            return False
    return False
