"""The suite's own ledger: what it asked for over HTTP, and what it was promised."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Self
from uuid import UUID

import httpx

from tests.proof.chaos.checker import Request
from tests.proof.chaos.domain import PLAIN_POISON, POISON

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

__all__ = ["Ledger"]


class Ledger:
    """Sends requests and remembers each, with its Idempotency-Key, before it is sent."""

    def __init__(self, urls: Sequence[str], dice: random.Random) -> None:
        self.requests: list[Request] = []
        self.refused: list[str] = []
        self.found = 0
        self._urls = urls
        self._dice = dice
        self._client = httpx.AsyncClient(timeout=6, trust_env=False, limits=httpx.Limits(max_keepalive_connections=20))
        self._load: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_load()
        await self._client.aclose()

    async def place(self, how: str = "") -> Request:
        """One new request."""
        subject = str(UUID(int=self._dice.getrandbits(128), version=4))
        key = str(UUID(int=self._dice.getrandbits(128), version=4))
        request = Request(key, subject, how, time.time(), poison=how in (*POISON, *PLAIN_POISON))
        self.requests.append(request)
        await self._send(request)
        return request

    async def _send(self, request: Request) -> None:
        url = self._dice.choice(self._urls)
        body = {"subject_id": request.subject, "how": request.how}
        try:
            response = await self._client.post(
                f"{url}/things", json=body, headers={"Idempotency-Key": f'"{request.key}"'}
            )
        except httpx.HTTPError:
            request.unanswered += 1
            return
        if response.status_code == 201 and response.json() == body:
            request.accepted = time.time()
            self.found += "idempotency-replayed" in response.headers
        elif response.status_code >= 500 or response.status_code == 409:
            request.unanswered += 1
        else:
            self.refused.append(f"{response.status_code} {response.text[:200]}")

    def start_load(self, rate: float) -> None:
        """Send `rate` ordinary requests a second from now on, whether or not the ones before were answered."""
        self._load = asyncio.create_task(self._keep_sending(1 / rate))

    async def _keep_sending(self, pause: float) -> None:
        while True:
            if len(self._sending) < 100:
                task = asyncio.create_task(self._place())
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            await asyncio.sleep(pause)

    async def _place(self) -> None:
        await self.place()

    async def stop_load(self) -> None:
        """Send no more, and wait for the answers that are due."""
        if self._load is not None:
            self._load.cancel()
            self._load = None
        await asyncio.gather(*self._sending)

    async def repeat(self, request: Request) -> bool:
        """Ask again under the same key, unless it was accepted; whether it is now."""
        if request.accepted is None:
            await self._send(request)
        return request.accepted is not None

    async def find_unanswered(self, until: float) -> int:
        """Repeat what was not answered, each under its key, until it is; how many are left at the time `until`."""
        while left := [request for request in self.requests if request.accepted is None]:
            if time.monotonic() > until:
                break
            await asyncio.gather(*(self._send(request) for request in left[:20]))
            await asyncio.sleep(0.1)
        return len(left)
