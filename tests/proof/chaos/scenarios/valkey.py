"""The broker forgets, fills up, refuses, or answers late."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from typing import Any

import redis

from tests.proof.chaos.scenario import scenario
from tests.proof.chaos.world import REDISPATCHED, Plan, World
from tests.waiting import until

QUEUES = ("stock", "mail")


@scenario(attempts=1)
async def valkey_flushed(world: World) -> None:
    """FLUSHALL of full queues, and again and again while they are worked off."""
    async with world.workers_away(QUEUES, loses=True), world.broker() as broker:
        await broker.flushall()
    for _ in range(3):
        await world.wait(world.dice.uniform(1, 2.5))
        async with world.broker() as broker:
            await broker.flushall()


@scenario(attempts=1)
async def valkey_lists_deleted(world: World) -> None:
    """The lists of ids vanish and their bodies stay, then the bodies vanish and the ids stay."""
    for suffix in ("", ".msgs"):
        async with world.workers_away(QUEUES, loses=True), world.broker() as broker:
            await broker.delete(*(f"dramatiq:{queue}{suffix}" for queue in QUEUES))
        await world.wait(1)


@scenario()
async def valkey_acks_deleted(world: World) -> None:
    """What says who has taken which message vanishes, and then one of those who had them."""
    world.hold()
    for _ in range(24):
        await world.place_surely("held")
    await until(world.held.in_flight, what="messages in flight")
    async with world.broker() as broker:
        keys = [key async for key in broker.scan_iter("dramatiq:__acks__*")]
        assert keys, "nobody has taken a message"
        await broker.delete(*keys)
    await world.wait(1)
    world.fleet.kill("worker-1")
    world.hold(held=False)
    await world.until(REDISPATCHED, 1)


@scenario(attempts=1)
async def valkey_restarted(world: World) -> None:
    """Killed and started again without persistence, once at once and once after a while."""
    async with world.workers_away(QUEUES, loses=True):
        await asyncio.to_thread(world.valkey.kill)
        await asyncio.to_thread(world.valkey.start)
    await world.wait(2)
    await asyncio.to_thread(world.valkey.kill)
    await world.wait(3)
    await asyncio.to_thread(world.valkey.start)
    await world.wait(1)


@scenario(attempts=1)
async def valkey_full(world: World) -> None:
    """At its memory limit it refuses every write, also the workers' own."""
    async with world.broker() as broker:
        for _ in range(2):
            await world.wait(1.5)
            await broker.config_set("maxmemory", 1)
            await world.wait(4)
            await broker.config_set("maxmemory", 0)


@scenario(attempts=1)
async def valkey_read_only(world: World) -> None:
    """It becomes a replica of nobody for a while."""
    async with world.broker() as broker:
        for _ in range(2):
            await world.wait(1.5)
            await broker.execute_command("REPLICAOF", "127.0.0.1", "1")
            await world.wait(3)
            await broker.execute_command("REPLICAOF", "NO", "ONE")


@scenario(attempts=1)
async def valkey_stalls(world: World) -> None:
    """It stands still for 7 s: longer than the relay waits, so what it then executes has no reader any more."""
    await world.wait(1.5)
    assert world.valkey.pid is not None
    os.kill(world.valkey.pid, signal.SIGSTOP)
    await world.wait(7)
    os.kill(world.valkey.pid, signal.SIGCONT)
    await world.wait(1)


@scenario(Plan(proxied=True), attempts=1)
async def valkey_answers_late(world: World) -> None:
    """It executes what the relays ask for, and the answers come after they have given up."""
    await world.wait(1)
    await world.network.set("relay-*:broker", "stall_replies")
    await world.wait(5)
    await world.network.set("relay-*:broker", "clear")
    await world.wait(1)


@scenario(attempts=1)
async def valkey_drops_clients(world: World) -> None:
    """Every connection is closed by the server, several times."""
    async with world.broker() as broker:
        for _ in range(6):
            await world.wait(world.dice.uniform(0.5, 1.5))
            await broker.execute_command("CLIENT", "KILL", "TYPE", "normal")
            with suppress(redis.ResponseError):
                await broker.execute_command("CLIENT", "KILL", "TYPE", "pubsub")


def _body(queue: str, actor: str, *arguments: Any, **more: Any) -> bytes:
    """A body as Dramatiq's would be; `ID` stands for its key."""
    fields = {"queue_name": queue, "actor_name": actor, "args": arguments, "kwargs": {}, "message_id": "m",
              "options": {"redis_message_id": "ID"}, "message_timestamp": 1, **more}  # fmt: skip
    return json.dumps(fields).encode()


_NOBODY = "00000000-0000-7000-8000-000000000000"
_ODD_BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe\x00",
    b'{"queue_name": "stock"}',
    _body("mail", "chaos.book", _NOBODY),
    _body("stock", "chaos.book", "not an id"),
    _body("stock", "chaos.book"),
    _body("stock", "chaos.book", None),
    _body("stock", "chaos.book", {"a": [1]}),
    _body("stock", "chaos.book", _NOBODY),
    _body("stock", "chaos.book", _NOBODY, extra=1),
    _body("stock", "chaos.book", _NOBODY, options=None),
    _body("stock", "chaos.book", _NOBODY, args="text", kwargs=[]),
    _body("stock", "chaos.book", _NOBODY, actor_name=None),
    _body("stock", "nobody.knows", {"a": 1}),
    _body("stock", "nobody.knows", _NOBODY),
    _body("stock", "chaos.book", "x" * 2_000_000),
)


@scenario()
async def odd_messages(world: World) -> None:
    """Bodies that no relay would write are pushed between the others, also ones that name another's row."""
    world.expected += [
        "Failed to process message nobody.knows(",
        "Failed to process message chaos.book('t', 'e', 'x', 't')",
    ]
    async with world.broker() as broker:
        for number, body in enumerate(_ODD_BODIES * 2):
            await broker.hset("dramatiq:stock.msgs", f"odd-{number}", body.replace(b"ID", f"odd-{number}".encode()))
            await broker.rpush("dramatiq:stock", f"odd-{number}")
            await world.wait(0.1)
        for row in await world.sql("SELECT id::text FROM outbox_message ORDER BY id LIMIT 50"):
            key = f"stolen-{row['id']}"
            body = _body("mail", "chaos.compute", row["id"]).replace(b"ID", key.encode())
            await broker.hset("dramatiq:mail.msgs", key, body)
            await broker.rpush("dramatiq:mail", key)
