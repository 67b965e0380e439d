"""A domain of the API's own tests, so that they outlive the example: a table, an event and routes that misbehave."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.database import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.errors import BusinessError
from service.idempotency import IdempotentRoute
from service.outbox import Delivery, Event, consumer, publish

__all__ = ["SCHEMA", "ProbeHappened", "router"]

SCHEMA = """
CREATE TABLE probe (id int PRIMARY KEY, name varchar(200), later int);
ALTER TABLE probe ADD CONSTRAINT later UNIQUE (later) DEFERRABLE INITIALLY DEFERRED;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON probe DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION slow();
"""

router = APIRouter(route_class=IdempotentRoute)


class ProbeHappened(Event, type="api_probe.happened"):
    """A probe was stored."""

    probe: int


@consumer(ProbeHappened, queue="probe", name="api_probe.note")
async def note(event: ProbeHappened, delivery: Delivery) -> None:
    """Consume the event, so that it has a row."""


class Probe(BaseModel):
    """A probe; nothing is bounded here, so that bad values reach the database."""

    model_config = ConfigDict(extra="forbid")

    id: int
    name: str = ""


class RefusedError(BusinessError):
    """A refusal."""

    code = "refused"
    title = "Refused"


async def _store(session: Session, id_: int, name: str = "", later: int | None = None) -> None:
    row = {"id": id_, "name": name, "later": later}
    await session.execute(text("INSERT INTO probe (id, name, later) VALUES (:id, :name, :later)"), row)
    publish(session, ProbeHappened(probe=id_))


@router.post("/probes", status_code=201)
async def store(body: Probe, session: Session, response: Response) -> Probe:
    """Store a probe and publish it."""
    await _store(session, body.id, body.name)
    response.headers["Location"] = f"/probes/{body.id}"
    return body


@router.get("/probes")
async def count(session: Session) -> int:
    """How many there are."""
    counted: int = (await session.execute(text("SELECT count(*) FROM probe"))).scalar_one()
    return counted


@router.post("/others", status_code=201)
async def store_other(body: Probe, session: Session) -> Probe:
    """The same under another path."""
    await _store(session, body.id + 1_000, body.name)
    return body


@router.post("/named/{name}", status_code=201)
async def answer_with_name(name: str, session: Session) -> list[str]:
    """Nothing is stored but the answer."""
    return [name]


async def _authenticated(request: Request) -> None:
    user = request.headers.get("user")
    if user is None:
        raise HTTPException(401, "Who are you?")
    request.state.principal = user


@router.post("/own", status_code=201)
async def store_own(body: Probe, session: Session, _user: Annotated[None, Depends(_authenticated)]) -> Probe:
    """The same for callers who say who they are."""
    await _store(session, body.id)
    return body


@router.post("/plain", status_code=201)
def answer_from_thread(body: Probe) -> int:
    """A `def` endpoint; every answer is another."""
    return time.monotonic_ns()


@router.post("/deferred", status_code=201)
async def break_constraint_at_commit(session: Session) -> None:
    """Everything works but the COMMIT."""
    await _store(session, 1, later=1)
    await _store(session, 2, later=1)


@router.post("/ends/{how}", status_code=201)
async def end_early(session: Session, how: str) -> None:
    """End the request's transaction, and go on as if nothing had happened."""
    await _store(session, 1)
    publish(session, ProbeHappened(probe=1))
    await (session.commit() if how == "commit" else session.rollback())


@router.post("/swallowed", status_code=201)
async def swallow(session: Session) -> None:
    """Go on after a database error as if nothing had happened."""
    await _store(session, 1)
    await session.flush()
    try:
        await _store(session, 1)
    except DBAPIError:
        return


@router.post("/divided", status_code=201)
async def divide(session: Session) -> None:
    """A bug that PostgreSQL notices."""
    await session.execute(text("SELECT 1 / count(*) FROM probe WHERE id = 0"))


@router.post("/killed", status_code=201)
async def lose_connection(session: Session) -> None:
    """Lose the connection in the middle."""
    await _store(session, 1)
    await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))


@router.post("/raising/{what}", status_code=201)
async def raise_after_writing(what: str, session: Session) -> None:
    """Write, flush, publish, then raise."""
    await _store(session, 1)
    await session.flush()
    errors: dict[str, Exception] = {
        "bug": RuntimeError("the secret inside"),
        "http": HTTPException(403, "no"),
        "business": RefusedError("Not today, señor."),
    }
    raise errors[what]


@router.get("/sleep/{seconds}")
async def sleep(seconds: float, session: Session) -> None:
    """Keep a connection busy."""
    await session.execute(text("SELECT pg_sleep(:seconds)"), {"seconds": seconds})


@router.get("/background")
async def work_afterwards(request: Request, tasks: BackgroundTasks) -> None:
    """Answer at once and work on for longer than a request may take."""

    async def work() -> None:
        await asyncio.sleep(1)
        request.app.state.worked = True

    tasks.add_task(work)


@router.post("/echo")
async def echo(body: dict[str, Any]) -> int:
    """Read a body."""
    return len(body)
