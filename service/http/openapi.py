"""Makes the OpenAPI document tell the truth about errors, and what leads where, so that no route has to.

Every operation can answer 422, 500, 503 and 504, one with a body also 400, 413 and 415, one that asks who is calling
also 401 and 403. Routes add only what their own `BusinessError`s cause, with `problem_responses`, and with `created`
that they make something: POST /orders is then linked to GET /orders/{order_id}, which lets the tests of the API try one
after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from service.http.problems import InvalidField, Problem, documented

if TYPE_CHECKING:
    from fastapi import FastAPI

ID = "$response.body#/id"
"""The id of what was just made, where a link passes it on."""

_LOCATION = {"Location": {"description": "Where it is from now on", "schema": {"type": "string"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_ALWAYS = {
    "500": documented("Something went wrong on our side"),
    "503": documented("The database is away or busy; repeat after Retry-After") | {"headers": _RETRY_AFTER},
    "504": documented("The request took too long; it may or may not have taken effect"),
}
_LIMITED = {"429": documented("Too many requests; repeat after Retry-After") | {"headers": _RETRY_AFTER}}
_WITH_CALLER = {
    "401": documented("The request does not say who is calling, or that is not believed"),
    "403": documented("The caller may not do this: the token lacks a scope"),
}
_WITH_INPUT = {"422": documented("A parameter or the body is not valid; `errors` says what")}
_WITH_BODY = {
    "400": documented("The request cannot be read"),
    "413": documented("The body is too large"),
    "415": documented("The body is not application/json"),
}


def created(**links: tuple[str, Any]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that answers 201 with an `id`, and says in `Location` where to find what has it.

    Args:
        links: What else to do with it: the name of an operation, and a body with `ID` in it.
    """
    others = {name: {"operationId": operation, "requestBody": body} for name, (operation, body) in links.items()}
    return {201: {"headers": _LOCATION, "links": others}}


def install_openapi(app: FastAPI) -> None:
    """Document the problem responses of every operation, and its links."""
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
                _document(operation, limited=app.state.settings.api.rate_limit > 0)
        _link(document["paths"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _document(operation: dict[str, Any], *, limited: bool) -> None:
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    usual = _ALWAYS | (_LIMITED if limited else {})
    if "security" in operation:
        usual |= _WITH_CALLER
    if "requestBody" in operation:
        usual |= _WITH_BODY
    if "requestBody" in operation or "parameters" in operation:
        usual |= _WITH_INPUT
    for status, response in usual.items():
        responses.setdefault(status, response)
    operation["responses"] = dict(sorted(responses.items()))


def _link(paths: dict[str, Any]) -> None:
    for path, operations in paths.items():
        where, _, parameter = path.rpartition("/")
        made = paths.get(where, {}).get("post", {}).get("responses", {}).get("201", {})
        if "get" in operations and parameter.startswith("{") and "Location" in made.get("headers", {}):
            get = {"operationId": operations["get"]["operationId"], "parameters": {parameter.strip("{}"): ID}}
            made.setdefault("links", {})["get"] = get
