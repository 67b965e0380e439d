"""Hands batches to Redis or Valkey, in one call of a script that runs whole or not at all.

The keys and bodies are those of Dramatiq's own Redis broker, so that any of its workers can consume them. What must
stay true: a body is never in the hash without its id in the list or the other way round, the body's
`redis_message_id` is that id, and an id is pushed only once while it is queued or in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from relay.brokers.sender import BrokerUnavailableError, QueueRefusedError, reason_of
from service.ledger.message import DueDelivery, doorbell, encode
from service.text import TRACEPARENT

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    from service.settings import BrokerSettings

# The bodies of a group differ only in the deliveries' ids and traces, so the script is sent those, end to end, and the
# pieces between them. Only a push onto an empty queue rings: every waiting worker has seen it empty since.
#
# Whoever deletes a list leaves its bodies behind, which nobody would ever fetch. While the list is gone and no worker
# holds anything that was in it, no body is wanted. Where the relay may not read what workers hold, bodies stay.
_SCRIPT = """
local list, bodies, doorbell = KEYS[1], KEYS[2], KEYS[3]
local workers, held, held_of = ARGV[2], ARGV[3], ARGV[4]
local suffix = ':' .. ARGV[1]
local waiting = redis.call('llen', list)
local was_empty = waiting == 0
if was_empty and redis.call('exists', bodies) == 1 then
    local known = redis.pcall('zrange', workers, 0, -1)
    local wanted = known.err ~= nil
    for _, worker in ipairs(known) do
        wanted = wanted or redis.pcall('exists', held .. worker .. held_of) ~= 0
    end
    if not wanted then
        redis.call('unlink', bodies)
    end
end
local new = {}
for group = 5, #ARGV, 7 do
    local ids, traces = ARGV[group + 5], ARGV[group + 6]
    for number = 0, #ids / 36 - 1 do
        local id = string.sub(ids, number * 36 + 1, number * 36 + 36)
        local unique = id .. suffix
        local body = ARGV[group] .. id .. ARGV[group + 1] .. unique .. ARGV[group + 2]
                     .. string.sub(traces, number * 55 + 1, number * 55 + 55) .. ARGV[group + 3]
                     .. id .. ARGV[group + 4]
        if redis.call('hsetnx', bodies, unique, body) == 1 then
            new[#new + 1] = unique
        end
    end
end
if #new > 0 then
    waiting = redis.call('rpush', list, unpack(new))
end
if was_empty then
    redis.call('publish', doorbell, '')
end
return waiting
"""

_MARK = uuid4().hex
"""Stands for a delivery's id; no consumer's name holds it."""

# A probe must be a write: a server that is full or a replica answers PING.
_PROBE_SCRIPT = """
redis.call('set', KEYS[1], '1', 'px', 1000)
return 1
"""

_BROKER_AT_FAULT = (
    RedisConnectionError,
    RedisTimeoutError,
    TimeoutError,
    OSError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,  # and the replica that has lost its primary
    MaxConnectionsError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)

# Error codes that redis-py has no class for, at the start of the reply.
_BROKER_AT_FAULT_CODES = ("OOM", "READONLY", "LOADING", "NOAUTH", "MISCONF", "NOREPLICAS", "BUSY", "UNKILLABLE",
                          "WRONGPASS")  # fmt: skip


class RedisSender:
    """The sender for `redis://` and `valkey://`."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._namespace = settings.namespace
        self._timeout = settings.publish_timeout
        self._client = redis.asyncio.Redis.from_url(
            settings.redis_url,
            **settings.redis_options,
            socket_timeout=settings.publish_timeout,
            socket_connect_timeout=settings.publish_timeout,
            # The relay's own loop decides about trying again, in a transaction of its own.
            retry=Retry(NoBackoff(), 0),
        )
        self._script = self._client.register_script(_SCRIPT)
        self._probe = self._client.register_script(_PROBE_SCRIPT)

    async def hand_over(self, queue: str, batch: Sequence[DueDelivery], transaction: str) -> int:
        list_key = f"{self._namespace}:{queue}"
        arguments = [transaction, f"{self._namespace}:__heartbeats__", f"{self._namespace}:__acks__.", f".{queue}"]
        for (consumer, traced), group in _groups(batch).items():
            arguments += _pieces(queue, consumer, traced=traced)
            arguments += (
                "".join(due.delivery_id for due in group),
                "".join(due.trace or "" for due in group) if traced else "",
            )
        keys = [list_key, f"{list_key}.msgs", doorbell(self._namespace, queue)]
        return int(await self._call(self._script(keys=keys, args=arguments)))

    async def depth(self, queue: str) -> int:
        return int(await self._call(self._client.llen(f"{self._namespace}:{queue}")))

    async def inspect(self, queue: str) -> int | None:
        """See `Sender.inspect`. A list without messages is one that does not exist."""
        await self._call(self._client.hlen(f"{self._namespace}:{queue}.msgs"))
        return await self.depth(queue)

    async def ping(self) -> None:
        try:
            await self._call(self._probe(keys=[f"{self._namespace}:__outbox_probe__"]))
        except QueueRefusedError as error:
            raise BrokerUnavailableError(str(error)) from error

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, command: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await command
        except _BROKER_AT_FAULT as error:
            raise BrokerUnavailableError(reason_of(error)) from error
        except ResponseError as error:
            if reason_of(error).removeprefix("-").startswith(_BROKER_AT_FAULT_CODES):
                raise BrokerUnavailableError(reason_of(error)) from error
            raise QueueRefusedError(reason_of(error)) from error
        except RedisError as error:
            raise BrokerUnavailableError(reason_of(error)) from error


def _groups(batch: Sequence[DueDelivery]) -> dict[tuple[str, bool], list[DueDelivery]]:
    """The deliveries by consumer, and by whether they have a trace that can be passed on."""
    groups: dict[tuple[str, bool], list[DueDelivery]] = defaultdict(list)
    for due in batch:
        groups[due.consumer, due.trace is not None and TRACEPARENT.fullmatch(due.trace) is not None].append(due)
    return groups


def _pieces(queue: str, consumer: str, *, traced: bool) -> tuple[str, ...]:
    """What stands before, between and after the id, the list's entry, the trace and the id in a body."""
    entry, trace = f"{_MARK}:", f"{_MARK}-" if traced else None
    body = encode(queue, DueDelivery(_MARK, consumer, trace), int(time.time() * 1000), entry)
    first, rest = body.split(_MARK, 1)
    between, rest = rest.split(entry, 1)
    before_trace, rest = rest.split(trace, 1) if trace else ("", rest)
    return (first, between, before_trace, *rest.split(_MARK, 1))
