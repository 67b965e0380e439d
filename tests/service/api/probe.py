"""A domain of the API's own tests, so that they outlive the example: a table, an event and routes that misbehave."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from service.errors import BusinessError, PublishError
from service.http.callers import PUBLIC, tells_caller
from service.http.idempotency import IdempotentRoute
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time
from service.outbox import Delivery, Event, accept, consumer, publish

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["ASLEEP", "ENDINGS", "SCHEMA", "ProbeHappened", "router"]

ASLEEP = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
"""The sessions that serve `/sleep`."""

SCHEMA = """
CREATE TABLE probe (id int PRIMARY KEY, name varchar(200), later int);
ALTER TABLE probe ADD CONSTRAINT later UNIQUE (later) DEFERRABLE INITIALLY DEFERRED;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON probe DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.name = 'slow') EXECUTE FUNCTION slow();
"""

router = APIRouter(route_class=IdempotentRoute, dependencies=[PUBLIC])


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


@router.post("/accepted", status_code=201)
async def take_over(body: Probe, session: Session) -> bool:
    """Take over an event from elsewhere, once."""
    return await accept(session, f"sender:{body.id}", ProbeHappened(probe=body.id))


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


@tells_caller
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


async def _end_by_block(session: AsyncSession) -> None:
    async with session.begin():
        publish(session, ProbeHappened(probe=2))


async def _enter_again(session: AsyncSession) -> None:
    async with session:
        publish(session, ProbeHappened(probe=2))


async def _roll_back_transaction(session: AsyncSession) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.rollback()


async def _commit_transaction(session: AsyncSession) -> None:
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.commit()


async def _of_driver(session: AsyncSession, statement: str) -> None:
    connection = await session.connection()
    await connection.execute(text("SELECT 1"))  # the transaction begins with a statement
    raw = await connection.get_raw_connection()
    assert raw.driver_connection is not None
    await raw.driver_connection.execute(statement)


async def _invalidate_connection(session: AsyncSession) -> None:
    connection = await session.connection()
    await connection.invalidate()


ENDINGS: dict[str, Callable[[AsyncSession], Awaitable[Any]]] = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "aclose": lambda session: session.aclose(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "begin": _end_by_block,
    "async with": _enter_again,
    "transaction.rollback": _roll_back_transaction,
    "transaction.commit": _commit_transaction,
    "run_sync commit": lambda session: session.run_sync(lambda sync: sync.commit()),
    "run_sync rollback": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "run_sync close": lambda session: session.run_sync(lambda sync: sync.close()),
    "connection.commit": lambda session: _of_connection(session, "commit"),
    "connection.rollback": lambda session: _of_connection(session, "rollback"),
    "connection.close": lambda session: _of_connection(session, "close"),
    "connection.invalidate": _invalidate_connection,
    "COMMIT": lambda session: session.execute(text("COMMIT")),
    "ROLLBACK": lambda session: session.execute(text("  -- why not?\n/* now */ rollback")),
    "COMMIT AND CHAIN": lambda session: session.execute(text("COMMIT AND CHAIN")),
    "END": lambda session: session.execute(text("END")),
    "driver COMMIT": lambda session: _of_driver(session, "COMMIT"),
    "driver ROLLBACK": lambda session: _of_driver(session, "ROLLBACK"),
    "driver several": lambda session: _of_driver(session, "SELECT 1; ROLLBACK"),
    "another one": lambda session: _of_driver(session, "SELECT 1; ROLLBACK; BEGIN"),
}
"""Ways to end a session's transaction, or to try."""


async def _of_connection(session: Session, method: str) -> None:
    await getattr(await session.connection(), method)()


@router.post("/ends/{how}", status_code=201)
async def end_early(session: Session, how: str, flush: bool = False, late: bool = False, swallow: bool = False) -> None:
    """End the request's transaction, and go on as if nothing had happened, or fail."""
    if flush:
        await _store(session, 1)
        await session.flush()
    publish(session, ProbeHappened(probe=1))
    try:
        await ENDINGS[how](session)
    except Exception:
        if not swallow:
            raise
    if late:
        raise RuntimeError("late")


@router.post("/forgets/{how}", status_code=201)
async def forget(session: Session, how: str) -> None:
    """Publish, and throw the session's objects out."""
    if how == "after a savepoint":
        async with session.begin_nested():
            pass
    if how == "in a savepoint":
        async with session.begin_nested():
            publish(session, ProbeHappened(probe=1))
            session.expunge_all()
    else:
        publish(session, ProbeHappened(probe=1))
        session.expunge_all()


@router.post("/undone", status_code=201)
async def undo(session: Session) -> None:
    """Publish something, and more in a savepoint that is rolled back."""
    publish(session, ProbeHappened(probe=1))
    try:
        async with session.begin_nested():
            await _store(session, 2)
            raise ValueError
    except ValueError:
        pass


@router.post("/afterwards", status_code=201)
async def publish_afterwards(request: Request, session: Session, tasks: BackgroundTasks) -> None:
    """Keep the session, and publish when the request is over."""

    def later() -> None:
        try:
            publish(session, ProbeHappened(probe=1))
        except PublishError as error:
            request.app.state.refused = str(error)

    tasks.add_task(later)


async def _audit(session: Session) -> None:
    publish(session, ProbeHappened(probe=0))


@router.post("/audited", status_code=201, dependencies=[Depends(_audit)])
async def store_audited(body: Probe, session: Session) -> Probe:
    """A dependency writes, too."""
    await _store(session, body.id)
    return body


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
