"""Every route says who may call it: by a dependency that tells who is calling, or by `PUBLIC`.

    router = APIRouter(dependencies=[PUBLIC])           # all of its routes, or by one line at a route

What must stay true: a route that says neither is not served, so that nobody opens one by forgetting. How callers are
told apart is not known here: `service.identity` does it, and a dependency of your own may, with `@tells_caller`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.routing import iter_route_contexts

from service.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastapi.dependencies.models import Dependant

_Dependency = TypeVar("_Dependency", bound="Callable[..., Any]")

_TELLING: set[Callable[..., Any]] = set()


def tells_caller(dependency: _Dependency) -> _Dependency:
    """Mark a dependency that refuses who may not call, and leaves the caller's name in `request.state.principal`."""
    _TELLING.add(dependency)
    return dependency


@tells_caller
async def _anybody(request: Request) -> None:
    if not hasattr(request.state, "principal"):
        request.state.principal = ""


PUBLIC = Depends(_anybody)
"""Anybody may call this, and all callers are one: `dependencies=[PUBLIC]`, of a router or of a route."""


def caller_of(request: Request) -> str:
    """The caller's name; empty on a public route.

    Raises:
        RuntimeError: nothing has told it.
    """
    name: str | None = getattr(request.state, "principal", None)
    if name is None:
        raise RuntimeError(f"nothing says who may call {request.url.path}: {_ADVICE}")
    return name


def check_callers(app: FastAPI) -> None:
    """Refuse routes that everybody could call because nobody has thought of it.

    Raises:
        ConfigurationError: naming each.
    """
    if silent := [name for name, dependencies in _routes(app) if not dependencies & _TELLING]:
        raise ConfigurationError(f"nothing says who may call {', '.join(silent)}: {_ADVICE}")


def is_asked(app: FastAPI, dependency: Callable[..., Any]) -> bool:
    """Whether a route of the application has this dependency."""
    return any(dependency in dependencies for _, dependencies in _routes(app))


_ADVICE = "give the route a caller (docs/who-is-calling.md), or say dependencies=[PUBLIC]"


def _routes(app: FastAPI) -> Iterator[tuple[str, set[Callable[..., Any]]]]:
    for route in iter_route_contexts(app.routes):
        dependant: Dependant | None = getattr(route, "dependant", None)  # none of a page or a file
        if dependant is not None:
            yield " ".join([*sorted(route.methods or ()), route.path or ""]), set(_all_of(dependant))


def _all_of(dependant: Dependant) -> Iterator[Callable[..., Any]]:
    for each in dependant.dependencies:
        if each.call is not None:
            yield each.call
        yield from _all_of(each)
