"""Code that holds the API's event loop is named in the log by its route and its place, without what it works on."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

import pytest

from service.http.callers import PUBLIC
from tests.service.api.serving import serve
from tests.waiting import until

if TYPE_CHECKING:
    from fastapi import FastAPI

    from service.settings import Settings
    from tests.service.api.conftest import MakeApp


def blocking(make_app: MakeApp, settings: Settings) -> FastAPI:
    """An API with a route that blocks, and one that waits in good order."""
    settings.loop_held_after = 1
    app = make_app()

    @app.get("/blocks/{secret}", dependencies=[PUBLIC])
    async def block(secret: str) -> str:
        await asyncio.sleep(0)
        time.sleep(4)  # noqa: ASYNC251
        return secret

    @app.get("/waits", dependencies=[PUBLIC])
    async def wait() -> None:
        await asyncio.sleep(3)

    @app.get("/in-a-thread", dependencies=[PUBLIC])
    def compute() -> None:
        time.sleep(3)

    return app


@pytest.mark.slow
async def test_each_time_is_told_once_with_the_template_of_the_route(
    make_app: MakeApp, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []

    def told() -> int:
        plain = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
        said.extend(line for line in plain.splitlines() if "loop.held" in line and "route=" in line)
        return len(said)

    async with serve(blocking(make_app, settings)) as client:
        for number in (1, 2):
            await client.get("/blocks/geheim")
            await until(lambda number=number: told() == number)  # type: ignore[misc]
        await asyncio.gather(*[client.get(path) for path in ("/waits", "/in-a-thread", "/waits")])
        assert told() == 2
    for line in said:
        assert "route=/blocks/{secret}" in line
        assert "method=GET" in line
        assert f"at='{__name__}:" in line
        assert "geheim" not in line
