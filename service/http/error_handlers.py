"""Which error becomes which problem response.

What must stay true: an error says what happened and what to do, never how the inside looks. A database that is away
is 503 with `Retry-After`, so that clients come back instead of giving up.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from service.errors import BusinessError, DatabaseUnavailableError
from service.http.problems import RETRY_AFTER, InvalidField, problem
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

MAX_ERRORS = 20
"""Invalid fields listed at most, so that a small request never causes a large response."""

# SQLSTATEs that a value in the request causes, beyond what the schemas catch: refused by the driver (22000), too long,
# out of range, NUL. Not all of class 22: a division by zero is a bug.
_VALUE_STATES = {"22000", "22001", "22003", "22008", "22021", "22P05"}
# Unique, foreign-key and exclusion violations: another request was faster.
_CONFLICT_STATES = {"23503", "23505", "23P01"}
# Connection, resources, intervention, system errors; then read-only after a failover, serialization, deadlock, lock.
_AWAY_CLASSES = {"08", "53", "57", "58"}
_AWAY_STATES = {"25006", "40001", "40P01", "55P03"}

_log = get_logger(__name__)


def install_handlers(app: FastAPI) -> None:
    """Make every expected error a problem response. What is left over is answered 500 by the middleware."""
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(BusinessError, _of_business)
    app.add_exception_handler(SQLAlchemyError, _of_database)
    app.add_exception_handler(DatabaseUnavailableError, _of_database)


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    if error.status_code == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = RETRY_AFTER | headers
    usual = HTTPStatus(error.status_code).phrase
    return problem(error.status_code, detail=None if error.detail == usual else str(error.detail), headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    # The router names the methods of the first route that fits the path; RFC 9110 wants those of all.
    allowed = set()
    for path, operations in request.app.openapi()["paths"].items():
        if _fits(path.split("/"), request.url.path.split("/")):
            allowed |= {method.upper() for method in operations}
    return sorted(allowed)


def _fits(template: list[str], path: list[str]) -> bool:
    return len(template) == len(path) and all(
        expected.startswith("{") or expected == actual for expected, actual in zip(template, path, strict=True)
    )


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return problem(400, detail="The body is not JSON.")
    if any(each["loc"][0] == "body" for each in found) and not _is_json(request):
        return problem(415, detail="Send the body with Content-Type: application/json.")
    fields = [
        InvalidField(
            pointer="".join(f"/{str(part)[:64]}" for part in each["loc"]),
            code=each["type"],
            message=each["msg"].removeprefix("Value error, "),
        )
        for each in found[:MAX_ERRORS]
    ]
    return problem(422, detail=f"{len(found)} invalid: see errors.", errors=fields)


def _is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


async def _of_business(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BusinessError)
    return problem(error.status, code=error.code, title=error.title, detail=error.detail, headers=error.headers)


async def _of_database(_request: Request, error: Exception) -> Response:
    orig = getattr(error, "orig", None)
    state = getattr(orig, "sqlstate", None) or ""
    match error:
        case PoolTimeoutError():
            return _unavailable()  # the pool has told it, and does not for each
        case DatabaseUnavailableError():
            return _away(str(error), error)
        case DBAPIError() if error.connection_invalidated or state[:2] in _AWAY_CLASSES or state in _AWAY_STATES:
            return _away(str(orig).partition("\n")[0], error)
        case DBAPIError() if state in _VALUE_STATES:
            _log.warning("request.value_refused", sqlstate=state)
            return problem(422, detail="A value is out of range or contains a character that cannot be stored.")
        case DBAPIError() if state in _CONFLICT_STATES:
            _log.warning("request.conflict", sqlstate=state)
            return problem(409, detail="The request collides with something that exists, or refers to what does not.")
        case _:
            raise error


def _away(reason: str, error: Exception) -> Response:
    _log.warning("database.unavailable", error=type(error).__name__, reason=reason)
    return _unavailable()


def _unavailable() -> Response:
    return problem(
        503,
        code="database_unavailable",
        detail="The database cannot be reached right now. Repeat the request, with the same Idempotency-Key if it has "
        "one.",
        headers=RETRY_AFTER,
    )
