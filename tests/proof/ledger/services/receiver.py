"""The service that accepts: an API and a worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from fastapi import APIRouter, Header
from pydantic import BaseModel
from sqlalchemy import text

import service.api
from service.http.callers import PUBLIC
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import Delivery, Event, accept, consumer
from tests.proof.ledger.services import crash
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_app", "setup_broker"]


class Arrived(Event, type="receiver.arrived"):
    subject_id: UUID


class Order(BaseModel):
    """What the sender knows of it."""

    subject_id: UUID


_router = APIRouter(dependencies=[PUBLIC])


@_router.post("/orders-elsewhere", status_code=201)
async def take_over(body: Order, session: Session, order_key: Annotated[str, Header()]) -> None:
    """Store the event, once, and answer after the commit."""
    await accept(session, f"sender:{order_key}", Arrived(subject_id=body.subject_id))
    await session.flush()
    await crash.here("receiver-before-commit")


@consumer(Arrived, queue="ledger", name="receiver.react")
async def react(event: Arrived, delivery: Delivery) -> None:
    """One effect, which names its subject."""
    async with delivery.begin() as session:
        await session.execute(
            text("INSERT INTO effect VALUES (:id, :consumer, :note)"),
            {"id": delivery.idempotency_key, "consumer": delivery.consumer, "note": str(event.subject_id)},
        )
        await crash.here("receiver-in-effect")


def create_app() -> FastAPI:
    """The service's own application, with the route that accepts."""
    app = service.api.create_app()
    app.include_router(_router)
    return app
