"""What stands before every page of the console: who may come in, from which page, and what a browser may do with it.

Plain ASGI. What must stay true: nothing but the style sheet, the scripts, the login and the probe is served to nobody;
what changes anything is taken from the console's own pages alone, as the browser tells it, beside the token that each
form has (`forms.py`); and a browser runs no script that is not a file of ours, whatever a payload or an error says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse

from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from service.console.operators import ConsoleIdentity

LOGIN = "/login"

_OPEN = ("/static/", "/health/")
_ASKS = ("GET", "HEAD")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    # Without any, a browser would not say in Origin where a form comes from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_log = get_logger(__name__)


class Doorkeeper:
    """Lets in who is known, and leaves them in `request.state.caller`."""

    def __init__(self, app: ASGIApp, identity: ConsoleIdentity) -> None:
        self.app = app
        self._identity = identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if scope["path"].startswith("/static/"):
                    headers["Cache-Control"] = "no-cache"  # asks whether it has changed
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self.app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        path: str = scope["path"]
        asks = scope["method"] in _ASKS
        if asks and path.startswith(_OPEN):
            return None
        if not asks and not _from_own_page(Headers(scope=scope)):
            _log.warning("console.foreign_form", path=path)
            return PlainTextResponse("This was not sent by a page of the console.", 403)
        caller = self._identity.caller(HTTPConnection(scope))
        scope.setdefault("state", {})["caller"] = caller
        if caller is not None or (path == LOGIN and self._identity.logs_in):
            return None
        if not self._identity.logs_in:
            _log.warning("console.refused", path=path)
            return PlainTextResponse("Nothing says who you are, or you may not see this.", 403)
        if "hx-request" in Headers(scope=scope):  # a page that shows itself again: as a whole, it leads to the login
            return PlainTextResponse("Your session has ended.", 401, {"HX-Refresh": "true"})
        if not asks:
            return PlainTextResponse("Your session has ended: nothing was done. Log in, and do it again.", 401)
        wanted = scope["raw_path"].decode("latin-1") + (
            "?" + scope["query_string"].decode("latin-1") if scope["query_string"] else ""
        )
        return RedirectResponse(f"{LOGIN}?to={quote(wanted, safe='')}", 303)


def _from_own_page(headers: Headers) -> bool:
    """By what a page cannot forge: the site as the browser sees it, and the origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site not in (None, "same-origin"):
        return False
    if origin is None:
        return site == "same-origin"
    return urlsplit(origin).netloc == headers.get("host", "")
