"""`Idempotency-Key` (IETF draft-ietf-httpapi-idempotency-key-header): a repeated request has the first one's effect.

    router = APIRouter(route_class=IdempotentRoute)     # every POST and PATCH of this router takes the header

The response is stored in the transaction that it answers for. So a request whose answer was lost can be repeated: if
it had been committed, its response is replayed; if not, it runs now. Only committed responses are stored; a refused
request left nothing behind and may be repeated, corrected, under the same key.

What must stay true: while a request runs it holds an advisory lock of its transaction. PostgreSQL makes a commit
visible before it releases the lock, so whoever gets the lock also sees the stored response.

A replay promises what the first response did. So it is given by a transaction that has undone whatever the request's
dependencies did this time, and whose commit waits for synchronous standbys as the first one should have: that one may
have been answered 504 while it waited, and be visible, but on this server only. A refusal (409, 422) promises nothing.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import re
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastapi import Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from sqlalchemy import Integer, LargeBinary, Text, func, select
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import Mapped, mapped_column

from service.database.base import Base
from service.database.sessions import confirm, restart
from service.errors import BusinessError
from service.http.callers import caller_of
from service.http.problems import problem_responses
from service.http.request_session import Session  # noqa: TC001  FastAPI resolves annotations at run time

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sqlalchemy.ext.asyncio import AsyncSession

MAX_KEY_LENGTH = 255

# The draft asks for a structured-field string, in quotes; a bare token is taken too, for many clients send one.
_QUOTED = r'"(?:[ !#-\[\]-~]|\\["\\])+"'
_BARE = r"[A-Za-z0-9._~:/+=@-]+"


class MalformedKeyError(BusinessError):
    """The header cannot be read."""

    status = 400
    code = "idempotency_key_malformed"
    title = "The Idempotency-Key header is malformed"


class ReusedKeyError(BusinessError):
    """The key belongs to another request."""

    status = 422
    code = "idempotency_key_reused"
    title = "The Idempotency-Key was used for another request"


class RequestInProgressError(BusinessError):
    """The first request under the key still runs."""

    status = 409
    code = "request_in_progress"
    title = "A request with this Idempotency-Key is still running"
    headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class IdempotencyKey(Base):
    """A request that was carried out, and its response. Purged by `created_at`."""

    __tablename__ = "idempotency_key"

    scope: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary)
    status: Mapped[int] = mapped_column(Integer)
    headers: Mapped[list[list[str]]] = mapped_column(JSONB)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(
        TIMESTAMP(timezone=True), server_default=func.clock_timestamp(), index=True
    )
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012


@dataclass(slots=True)
class _Keyed:
    """A request with a key: `_take_key` makes it, `_claim` fills in the rest, `IdempotentRoute` stores the response."""

    request: Request
    session: AsyncSession
    key: str
    scope: str = ""
    fingerprint: bytes = b""


class _Replay(Exception):  # noqa: N818  it carries the answer, it reports no error
    def __init__(self, session: AsyncSession, stored: IdempotencyKey) -> None:
        self.session = session
        self.response = _replayed(stored)  # the rollback expires what was read


_KEYED: ContextVar[_Keyed | None] = ContextVar("idempotency_key", default=None)
"""How it gets from the dependency to the endpoint, which need not ask for the request, and back to the route: the three
of them run in one task."""


async def _take_key(
    request: Request,
    session: Session,
    header: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="A key of your choice, new for each request you mean and the same when you repeat one; best a "
            "UUID, in double quotes.",
            json_schema_extra={"pattern": f"^(?:{_QUOTED}|{_BARE})$", "maxLength": MAX_KEY_LENGTH + 2},
        ),
    ] = None,
) -> None:
    given = header is not None
    _KEYED.set(_Keyed(request, session, _parsed(request.headers.getlist("idempotency-key"))) if given else None)


def _once(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(endpoint)
    async def claim_and_run(*args: Any, **kwargs: Any) -> Any:
        # Every dependency has been solved by now, so whoever may not make the request is not given its answer either.
        if (keyed := _KEYED.get()) is not None:
            await _claim(keyed)
        if inspect.iscoroutinefunction(endpoint):
            return await endpoint(*args, **kwargs)
        return await run_in_threadpool(endpoint, *args, **kwargs)

    return claim_and_run


async def _claim(keyed: _Keyed) -> None:
    request, session, key = keyed.request, keyed.session, keyed.key
    # As it was sent: decoded, a path may hold what PostgreSQL cannot store, and two paths may become one.
    path = request.scope["raw_path"].decode("latin-1")
    scope = keyed.scope = f"{caller_of(request)} {request.method} {path}"
    keyed.fingerprint = hashlib.sha256(request.url.query.encode() + b"\0" + await request.body()).digest()
    lock = int.from_bytes(hashlib.sha256(f"{scope} {key}".encode()).digest()[:8], "big", signed=True)
    if not await session.scalar(select(func.pg_try_advisory_xact_lock(lock))):
        raise RequestInProgressError("The first request with this key has not been answered yet: repeat it later.")
    stored = await session.get(IdempotencyKey, (scope, key))
    if stored is not None and stored.fingerprint != keyed.fingerprint:
        raise ReusedKeyError("The key came with another body before: use a new key for a new request.")
    if stored is not None:
        raise _Replay(session, stored)


def _parsed(values: list[str]) -> str:
    value = values[0].strip() if len(values) == 1 else ""
    if re.fullmatch(_BARE, value):
        key = value
    elif re.fullmatch(_QUOTED, value):
        key = re.sub(r"\\(.)", r"\1", value[1:-1])
    else:
        raise MalformedKeyError('Send it once, as a string in double quotes: Idempotency-Key: "8e03978e-40d5-43e8"')
    if len(key) > MAX_KEY_LENGTH:
        raise MalformedKeyError(f"A key has {MAX_KEY_LENGTH} characters at most.")
    return key


class IdempotentRoute(APIRoute):
    """A route whose POST and PATCH take `Idempotency-Key`: `APIRouter(route_class=IdempotentRoute)`.

    A key is scoped to the caller, the method and the path. On a public route all callers are one: whoever guesses
    another's key is given the other's response.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self._takes_key = bool(set(options.get("methods") or ()) & {"POST", "PATCH"})
        if self._takes_key:
            options["dependencies"] = [Depends(_take_key), *(options.get("dependencies") or [])]
            known = problem_responses(MalformedKeyError, RequestInProgressError)
            options["responses"] = known | (options.get("responses") or {})
            endpoint = _once(endpoint)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The usual handler; what it returns is stored before the session dependency commits."""
        handle = super().get_route_handler()
        if not self._takes_key:
            return handle

        async def handle_once(request: Request) -> Response:
            try:
                response = await handle(request)
            except _Replay as replay:
                await restart(replay.session)
                await confirm(replay.session)
                return replay.response
            if (keyed := _KEYED.get()) is not None:
                keyed.session.add(_stored(keyed, response))
            return response

        return handle_once


def _stored(keyed: _Keyed, response: Response) -> IdempotencyKey:
    if not isinstance(getattr(response, "body", None), bytes):
        raise TypeError("a streamed response cannot be stored for its Idempotency-Key: return a plain one")
    return IdempotencyKey(
        scope=keyed.scope,
        key=keyed.key,
        fingerprint=keyed.fingerprint,
        status=response.status_code,
        headers=[[name.decode("latin-1"), value.decode("latin-1")] for name, value in response.raw_headers],
        body=response.body,
    )


def _replayed(stored: IdempotencyKey) -> Response:
    response = Response(stored.body, stored.status)
    response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in stored.headers]
    response.headers["Idempotency-Replayed"] = "true"
    return response
