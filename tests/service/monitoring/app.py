"""An API and a worker to be watched: `create_app`, and `dramatiq tests.service.monitoring.app:setup_broker`."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from fastapi import BackgroundTasks  # noqa: TC002  FastAPI resolves annotations at run time

from service import api
from service.http.callers import PUBLIC
from service.http.request_session import Session  # noqa: TC001
from service.outbox import Delivery, Event, Fail, consumer, new_id, publish
from tests.servers.broker import setup_broker

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["create_app", "setup_broker"]


class Watched(Event, type="monitoring.watched"):
    """Its consumer ends as `how` says."""

    subject_id: UUID
    how: str


@consumer(Watched, queue="watched", name="monitoring.watch", max_retries=1)
async def watch(event: Watched, _delivery: Delivery) -> None:
    match event.how:
        case "fail":
            raise RuntimeError("not this time")
        case "die":
            raise Fail("not worth another try")


def create_app() -> FastAPI:
    """The API with a route that publishes, and whose background task fails if it is told to."""
    app = api.create_app()

    @app.post("/watched/{how}", status_code=201, dependencies=[PUBLIC])
    async def happen(how: str, session: Session, tasks: BackgroundTasks) -> None:
        publish(session, Watched(subject_id=new_id(), how=how))
        if how == "fail":
            tasks.add_task(fail)

    return app


def fail() -> None:
    raise RuntimeError("afterwards")
