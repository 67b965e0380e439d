"""What stands before everything else where the API is open to the world: whom it answers for, and how often.

Plain ASGI, each added only where a setting asks for it. What must stay true: probes pass, for they name the host as
they like and must not be counted; and what is remembered of callers is bounded, however many there are.
"""

from __future__ import annotations

import time
from ipaddress import IPv6Address, ip_address
from math import ceil
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from service.http.problems import problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from starlette.types import ASGIApp, Receive, Scope, Send

REMEMBERED = 10_000
"""Callers whose requests are counted at a time; of more, those are forgotten who have been away longest."""

_PERIOD = 60.0
_ROUNDING = 1e-6
"""Seconds. The last of a minute's requests is not lost to it."""


class KnownHosts:
    """Refuse a request for a host that is not this API's with 400."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self.app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_probe(scope):
            name, colon, port = Headers(scope=scope).get("host", "").lower().rpartition(":")
            host = name if colon and port.isdecimal() else name + colon + port
            if host not in self._hosts:
                refusal = problem(400, code="unknown_host", title="The Host header names none of this API's hosts")
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


class Allowance:
    """How many requests each caller may still send: `per_minute` at once, and one more in each part of a minute.

    Of a caller nothing is kept but when its allowance is whole again (the generic cell rate algorithm).
    """

    def __init__(
        self, per_minute: int, *, remembered: int = REMEMBERED, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._each = _PERIOD / per_minute
        self._remembered = remembered
        self._clock = clock
        self._whole_at: dict[str, float] = {}  # in the order of use

    def take(self, caller: str) -> float:
        """Take one. The answer is 0, or how many seconds until there is one."""
        now = self._clock()
        whole_at = max(self._whole_at.pop(caller, now), now) + self._each
        wait = whole_at - now - _PERIOD
        refused = wait > _ROUNDING
        self._whole_at[caller] = whole_at - self._each if refused else whole_at
        if len(self._whole_at) > self._remembered:
            del self._whole_at[next(iter(self._whole_at))]
        return wait if refused else 0.0


class RateLimit:
    """Refuse whoever asks too often with 429. Each process counts for itself."""

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self.app = app
        self._allowance = Allowance(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_probe(scope) and (wait := self._allowance.take(counted_as(scope))):
            refusal = problem(429, headers={"Retry-After": f"{ceil(wait)}"})
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)


def counted_as(scope: Scope) -> str:
    """Whose requests are counted together: those of one address, and of IPv6 one network, which one customer has.

    The address is what Uvicorn makes of it: the client's own, or behind a proxy that it believes the last one that no
    such proxy has.
    """
    address: str = scope["client"][0] if scope.get("client") else ""
    if ":" not in address:
        return address[:64]
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:64]
    if not isinstance(parsed, IPv6Address):
        return address
    return str(parsed.ipv4_mapped or IPv6Address(int(parsed) >> 64 << 64))


def _is_probe(scope: Scope) -> bool:
    path: str = scope["path"]
    return path.startswith("/health/")
