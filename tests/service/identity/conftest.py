"""The API with routes that ask who is calling, and an issuer whose tokens it takes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003  FastAPI resolves annotations at run time

import pytest
import structlog
from fastapi import APIRouter

from service.api import create_app
from service.http.idempotency import IdempotentRoute
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.identity import Principal, needs
from service.outbox import new_id
from service.settings import IdentitySettings
from tests.service.api.serving import serve
from tests.service.identity.issuing import AUDIENCE, KeyServer, SigningKey, key_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    import httpx

    from service.settings import Settings

Serve = Callable[..., "AbstractAsyncContextManager[httpx.AsyncClient]"]

router = APIRouter(route_class=IdempotentRoute)


@router.get("/me")
async def say_who(caller: Annotated[Principal, needs()]) -> list[str]:
    """The caller's ID, and scopes."""
    return [caller.id, *sorted(caller.scopes or ())]


@router.post("/things", status_code=201)
async def make_thing(caller: Annotated[Principal, needs("things:write")], session: Session) -> UUID:
    """Another one each time."""
    return new_id()


@pytest.fixture(autouse=True)
def plain_tracebacks() -> None:
    """Log as the service does; structlog's default takes seconds to print an exception."""
    structlog.configure([structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)])


@pytest.fixture(scope="session")
def key() -> SigningKey:
    """The issuer's key."""
    return SigningKey("first")


@pytest.fixture
async def server(key: SigningKey) -> AsyncIterator[KeyServer]:
    """Publishes the issuer's key."""
    async with key_server(key) as server:
        yield server


@pytest.fixture
def serve_with(settings: Settings) -> Serve:
    """The API with other settings about callers: `async with serve_with(api_keys=[...]) as client`."""

    @asynccontextmanager
    async def serving(**identity: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(settings.model_copy(update={"identity": IdentitySettings.model_validate(identity)}))
        app.include_router(router)
        async with serve(app) as client:
            yield client

    return serving


@pytest.fixture
async def client(serve_with: Serve, server: KeyServer) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API that takes the issuer's tokens."""
    async with serve_with(issuer=server.url, audience=AUDIENCE, keys_url=f"{server.url}/keys") as client:
        yield client
