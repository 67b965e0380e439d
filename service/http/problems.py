"""The shape of every error response: RFC 9457 problem details with a stable `code`.

What must stay true: bodies are ASCII, because what a client sent and an error repeats (a lone surrogate in a field's
name, say) is not always text that can be encoded.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import Response
from pydantic import BaseModel, Field

from service.telemetry.logs import current_headers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.errors import BusinessError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER = {"Retry-After": "2"}

# Python renames phrases between versions; codes and titles are promises to clients.
_STATUSES: dict[int, tuple[str, str]] = {
    400: ("malformed_request", "The request cannot be read"),
    401: ("unauthorized", "Authentication is required"),
    403: ("forbidden", "This is not allowed"),
    404: ("not_found", "There is nothing here"),
    405: ("method_not_allowed", "The method is not allowed here"),
    406: ("not_acceptable", "No acceptable representation exists"),
    409: ("conflict", "The request conflicts with the current state"),
    413: ("content_too_large", "The request body is too large"),
    415: ("unsupported_media_type", "The request body must be application/json"),
    422: ("invalid_request", "The request is not valid"),
    429: ("too_many_requests", "Too many requests"),
    500: ("internal_error", "Something went wrong on our side"),
    503: ("service_unavailable", "The service is temporarily unavailable"),
    504: ("timeout", "The request took too long and was abandoned"),
}


class InvalidField(BaseModel):
    """One thing that is wrong with the request."""

    pointer: str = Field(description="Where: a JSON pointer that starts with body, query, path or header")
    code: str
    message: str


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="A URN of the code")
    title: str
    status: int
    code: str = Field(description="Stable; programs decide by it")
    detail: str | None = Field(None, description="What happened here, for people")
    correlation_id: str = Field(description="Finds the request in the logs")
    errors: list[InvalidField] | None = None


def problem(
    status: int,
    *,
    code: str | None = None,
    title: str | None = None,
    detail: str | None = None,
    errors: list[InvalidField] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem response; `code` and `title` default to those of the status."""
    usual_code, usual_title = _STATUSES.get(status) or (f"http_{status}", HTTPStatus(status).phrase)
    body = Problem(
        type=f"urn:problem-type:{code or usual_code}",
        title=title or usual_title,
        status=status,
        code=code or usual_code,
        detail=detail,
        correlation_id=current_headers()["correlation_id"],
        errors=errors,
    )
    content = json.dumps(body.model_dump(exclude_none=True)).encode("ascii")
    return Response(content, status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def documented(description: str) -> dict[str, Any]:
    """An OpenAPI response that is a problem."""
    return {"description": description, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def problem_responses(*errors: type[BusinessError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that raises these errors: `responses=problem_responses(UnknownOrder)`."""
    by_status: dict[int, list[str]] = {}
    for error in errors:
        by_status.setdefault(error.status, []).append(f"{error.title} (`{error.code}`)")
    return {status: documented("; ".join(reasons)) for status, reasons in by_status.items()}
