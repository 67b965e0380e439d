"""API and worker of the release that the environment variable RELEASE names: `older` or `newer`."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi import APIRouter

import service.api
from service.http.callers import PUBLIC
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import Event, publish
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_app", "setup_broker"]

_EVENTS: tuple[type[Event], ...] = importlib.import_module(f"tests.proof.ledger.release.{os.environ['RELEASE']}").EVENTS
_router = APIRouter(dependencies=[PUBLIC])


@_router.post("/releases", status_code=201)
async def publish_each(session: Session) -> None:
    """Publish one event of each type, with whatever fields this release knows."""
    for event in _EVENTS:
        fields = {"added": 9, "weight": 2000, "unit": "g"} if event.event_version == 2 else {"added": 9, "weight": 2}
        publish(session, event.model_validate({"subject_id": uuid4(), **fields}))


def create_app() -> FastAPI:
    """The service's own application, with a route that publishes."""
    app = service.api.create_app()
    app.include_router(_router)
    return app
