"""The suite's side of the proxy: which links there are, and what is done to them."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Self

from service.dev.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Network"]


class Network:
    """A proxy process. `ports` are its listeners by link; `set` changes how links behave; `cuts` counts what it cut."""

    def __init__(self, targets: Mapping[str, tuple[str, int]], seed: int) -> None:
        self._targets = targets
        self._seed = seed
        self._process: asyncio.subprocess.Process | None = None
        self.ports: dict[str, int] = {}
        self.cuts = 0

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.proof.chaos.proxy", json.dumps(self._targets), str(self._seed),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        self.ports = json.loads(await self._answer())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()  # it ends with its stdin, so it cannot outlive us either
        await self._process.wait()

    async def _answer(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def set(self, links: str, mode: str, value: float = 0.0) -> None:
        """Change the links that match the pattern; see `tests.proof.chaos.proxy` for the modes."""
        await self._command(links=links, mode=mode, value=value)

    async def aim(self, links: str, socket: str) -> None:
        """Reset the links that match the pattern, and connect them to this Unix socket from now on."""
        await self._command(links=links, mode="aim", socket=socket)

    async def _command(self, **command: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        async with asyncio.timeout(30):
            self.cuts = int(await self._answer())
