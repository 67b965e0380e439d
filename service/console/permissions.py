"""What each route of the console asks for: a role, which says who is calling, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, HTTPException, Request

from service.console.operators import ConsoleCaller
from service.http.callers import tells_caller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from service.settings import ConsoleRole


def _needs(*roles: ConsoleRole) -> Callable[[Request], Awaitable[ConsoleCaller]]:
    async def ask(request: Request) -> ConsoleCaller:
        caller: ConsoleCaller = request.state.caller
        if lacking := [role for role in roles if not caller.may(role)]:
            raise HTTPException(403, f"This takes the role {lacking[0]}, which you do not have.")
        request.state.principal = caller.name
        return caller

    return tells_caller(ask)


Viewer = Annotated[ConsoleCaller, Depends(_needs("viewer"))]
Acting = Annotated[ConsoleCaller, Depends(_needs("operator"))]
Revealing = Annotated[ConsoleCaller, Depends(_needs("payload"))]
Editing = Annotated[ConsoleCaller, Depends(_needs("operator", "payload"))]
