"""A domain of the traces' own tests, so that they outlive the example.

`tests.service.traces.app:create_app` is its API, and `dramatiq tests.service.traces.app:setup_broker` its worker.

A parcel is sent by a request. Packing it publishes an event, weighing it fails once, billing it is no trouble, and
announcing it fails for good until the file is there that the event names.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel

from service import api
from service.http.callers import PUBLIC
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import Delivery, Event, Fail, consumer, new_id, publish
from service.telemetry.logs import get_logger
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["SECRET", "create_app", "create_app_without_sdk", "setup_broker", "setup_broker_without_sdk"]

SECRET = "a-secret-of-the-payload"

_log = get_logger(__name__)

router = APIRouter(dependencies=[PUBLIC])


class Sent(Event, type="parcel.sent"):
    """A parcel was sent."""

    parcel_id: UUID
    secret: str
    announced_once: str


class Packed(Event, type="parcel.packed"):
    """It is in its box."""

    parcel_id: UUID


class Reminded(Event, type="parcel.reminded"):
    """Somebody wants to be told of it later."""

    parcel_id: UUID


class Parcel(BaseModel):
    """What a client says."""

    announced_once: str


@router.post("/parcels", status_code=201)
async def send(body: Parcel, session: Session) -> UUID:
    """Send a parcel."""
    parcel_id = new_id()
    publish(session, Sent(parcel_id=parcel_id, secret=SECRET, announced_once=body.announced_once))
    publish(session, Reminded(parcel_id=parcel_id), delay=timedelta(milliseconds=100))
    return parcel_id


@router.post("/broken")
async def break_down(session: Session) -> None:
    """Fail."""
    raise RuntimeError(SECRET)


@consumer(Sent, queue="parcels", name="parcels.pack")
async def pack(event: Sent, delivery: Delivery) -> None:
    """An effect that causes another."""
    async with delivery.begin() as session:
        publish(session, Packed(parcel_id=event.parcel_id))
    _log.info("parcel.packed")


@consumer(Packed, queue="parcels", name="parcels.load")
async def load(_event: Packed, _delivery: Delivery) -> None:
    """The other."""


@consumer(Sent, queue="parcels", name="parcels.weigh")
def weigh(event: Sent, delivery: Delivery) -> None:
    """A `def` consumer that is retried once."""
    _log.info("parcel.weighed")
    if delivery.attempt == 1:
        raise RuntimeError(f"the scales are stuck on {event.secret}")


@consumer(Sent, queue="parcels", name="parcels.announce")
async def announce(event: Sent, _delivery: Delivery) -> None:
    """Dies until somebody makes the file."""
    if not await asyncio.to_thread(Path(event.announced_once).exists):
        raise Fail(f"nobody is at home for {event.secret}")


@consumer(Sent, queue="parcels", name="parcels.bill")
async def bill(_event: Sent, _delivery: Delivery) -> None:
    """Nothing to it."""


@consumer(Reminded, queue="parcels", name="parcels.remind")
async def remind(_event: Reminded, _delivery: Delivery) -> None:
    """Late on purpose."""


def create_app() -> FastAPI:
    """The API with that route."""
    app = api.create_app()
    app.include_router(router)
    return app


def create_app_without_sdk() -> FastAPI:
    """As in a virtual environment without the extra."""
    _hide_sdk()
    return create_app()


def setup_broker_without_sdk() -> None:
    """As in a virtual environment without the extra."""
    _hide_sdk()
    setup_broker()


def _hide_sdk() -> None:
    absent: dict[str, Any] = dict.fromkeys(("opentelemetry.sdk.resources", "opentelemetry.exporter.otlp.proto.http"))
    sys.modules.update(absent)
