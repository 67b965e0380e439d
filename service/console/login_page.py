"""Logging in and out, for local users."""

from __future__ import annotations

import asyncio
import re
from math import ceil

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from service.console.doorkeeper import LOGIN
from service.console.forms import OwnForm, read_form
from service.console.operators import COOKIE, LocalUsers
from service.console.passwords import fits
from service.console.permissions import Viewer
from service.console.rendering import page
from service.http.callers import PUBLIC
from service.http.edge import Allowance, counted_as
from service.telemetry.logs import get_logger

router = APIRouter()

_OWN = re.compile(r"/(?!/)[!-\[\]-~]*")
"""A path without a host. Browsers take a backslash for a slash, and leave out tabs and line ends."""

TRIES = 10
"""Passwords that may be tried from an address in a minute."""

_log = get_logger(__name__)


@router.get(LOGIN, dependencies=[PUBLIC])
async def ask_for_password(request: Request, to: str = "/") -> Response:
    """The form."""
    _users(request)
    return page(request, "login.html", to=_own(to), problem="")


@router.post(LOGIN, dependencies=[PUBLIC])
async def log_in(request: Request) -> Response:
    """Begin a session. The form has no token, for there is no session yet: who sends it is told by its origin."""
    users, form = _users(request), await read_form(request)
    tries: Allowance = request.app.state.tries
    if wait := tries.take(counted_as(request.scope)):
        raise HTTPException(429, f"Too many passwords were tried. Try again in {ceil(wait)} s.")
    name, to = form["name"], _own(form["to"])
    if not await asyncio.to_thread(fits, form["password"], users.kept_of(name)):
        _log.warning("console.login_refused", user=name[:64])
        return page(request, "login.html", status=401, to=to, problem="Name and password do not fit.")
    response = RedirectResponse(to, 303)
    response.set_cookie(
        COOKIE,
        users.new_session(name),
        max_age=int(request.app.state.settings.console.session),
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    _log.info("console.login", user=name)
    return response


@router.post("/logout")
async def log_out(request: Request, caller: Viewer, form: OwnForm) -> Response:
    """End the session in this browser."""
    response = RedirectResponse(LOGIN, 303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


def _users(request: Request) -> LocalUsers:
    identity = request.app.state.identity
    if not isinstance(identity, LocalUsers):
        raise HTTPException(404, "There are no local users here.")
    return identity


def _own(path: str) -> str:
    """A path of ours, whatever was asked for: never another site."""
    return path if _OWN.fullmatch(path) else "/"
