"""Makes the OpenAPI document tell the truth about errors, so that no route has to.

Every operation can answer 422, 500, 503 and 504, one with a body also 400, 413 and 415. Routes add only what their own
`BusinessError`s cause, with `problem_responses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.http.problems import InvalidField, Problem, documented

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["install_openapi"]

_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_ALWAYS = {
    "500": documented("Something went wrong on our side"),
    "503": documented("The database is away or busy; repeat after Retry-After") | {"headers": _RETRY_AFTER},
    "504": documented("The request took too long; it may or may not have taken effect"),
}
_WITH_INPUT = {"422": documented("A parameter or the body is not valid; `errors` says what")}
_WITH_BODY = {
    "400": documented("The request cannot be read"),
    "413": documented("The body is too large"),
    "415": documented("The body is not application/json"),
}


def install_openapi(app: FastAPI) -> None:
    """Document the problem responses of every operation."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Problem" in schemas:
            return document
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["InvalidField"] = InvalidField.model_json_schema()
        schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas["Problem"].pop("$defs")
        for operations in document["paths"].values():
            for operation in operations.values():
                _document(operation)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _document(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    usual = dict(_ALWAYS)
    if "requestBody" in operation:
        usual |= _WITH_BODY
    if "requestBody" in operation or "parameters" in operation:
        usual |= _WITH_INPUT
    for status, response in usual.items():
        responses.setdefault(status, response)
    operation["responses"] = dict(sorted(responses.items()))
