"""The processes that are attacked: `create_app` for Uvicorn and `setup_broker` for Dramatiq."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

import service.api
from service.http.callers import PUBLIC
from service.http.idempotency import IdempotentRoute
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import publish
from tests.proof.chaos.beats import Beat
from tests.proof.chaos.domain import PLAIN_POISON, POISON, PlainlyPoisoned, Poisoned, ThingMade, ThingNumbered
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Beat", "create_app", "setup_broker"]

router = APIRouter(route_class=IdempotentRoute, dependencies=[PUBLIC])


class Thing(BaseModel):
    """What is asked for, and what was stored."""

    subject_id: UUID
    how: str = ""


@router.post("/things", status_code=201)
async def make_thing(body: Thing, session: Session) -> Thing:
    """Store a thing and publish it."""
    await session.execute(
        text("INSERT INTO thing VALUES (:subject, :how)"), {"subject": body.subject_id, "how": body.how}
    )
    if body.how in POISON:
        publish(session, Poisoned(subject_id=body.subject_id, how=body.how))
    elif body.how in PLAIN_POISON:
        publish(session, PlainlyPoisoned(subject_id=body.subject_id, how=body.how))
    else:
        publish(session, ThingMade(subject_id=body.subject_id, how=body.how))
    if os.environ.get("CHAOS_ORDERED"):
        key = body.subject_id.int % int(os.environ["CHAOS_ORDERED"])
        number = await session.scalar(
            text("UPDATE key SET numbers = numbers + 1 WHERE key = :key RETURNING numbers"), {"key": key}
        )
        publish(session, ThingNumbered(key=key, number=number))
    return body


def create_app() -> FastAPI:
    """The service's own application, with the suite's routes."""
    app = service.api.create_app()
    app.include_router(router)
    return app
