"""Who is calling: the one place where a request becomes a `Principal`, or is refused.

    Buyer = Annotated[Principal, needs("orders:write")]

    @router.post("/orders")
    async def place_order(caller: Buyer, ...) -> OrderRead:     # `caller.id` owns what is stored

Everybody shows who they are in one header, `Authorization: Bearer ...`: people, and what acts for them, by an issuer's
token; machines by an API key. What must stay true: no request gets an ID that another way of calling could get too; and
nothing that was shown is logged or stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastapi import FastAPI, HTTPException, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase

from service.errors import BusinessError, ConfigurationError
from service.http.callers import is_asked, tells_caller
from service.identity.api_keys import looks_like_api_key, machine_of
from service.identity.issuer_keys import IssuerAwayError
from service.identity.tokens import BadTokenError, Tokens
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from service.settings import IdentitySettings

_BEARER = re.compile(r"bearer +(\S+)", re.IGNORECASE)
_log = get_logger(__name__)


class UnauthenticatedError(BusinessError):
    """The request does not say who is calling."""

    status = 401
    code = "unauthenticated"
    title = "Say who you are"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class RefusedTokenError(BusinessError):
    """The request says it by something that is not believed."""

    status = 401
    code = "token_refused"
    title = "The token is not accepted"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class MissingScopeError(BusinessError):
    """The caller is known, and may not do this."""

    status = 403
    code = "missing_scope"
    title = "This is not allowed with this token"
    headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling.

    Attributes:
        id: Names them for ever, and nobody else: what a row's owner is told by.
        scopes: What they may do; `None` behind a gateway that has decided it.
    """

    id: str
    scopes: frozenset[str] | None


class Identity:
    """Tells callers apart as the settings say."""

    def __init__(self, settings: IdentitySettings) -> None:
        self._settings = settings
        self._tokens = Tokens(settings) if settings.issuer else None

    async def caller(self, request: Request) -> Principal:
        """Who sent the request.

        Raises:
            UnauthenticatedError: it does not say.
            RefusedTokenError: it is not believed.
            HTTPException: 503, while the issuer is away.
        """
        if self._settings.off:
            return self._believed(request)
        given = request.headers.getlist("authorization")
        if not given:
            raise UnauthenticatedError("Send a token or an API key: Authorization: Bearer ...")
        shown = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
        if shown is None:
            raise _refused("Send one header, Authorization: Bearer, with one token")
        if looks_like_api_key(shown[1]):
            return self._machine(shown[1])
        return await self._holder(shown[1])

    def _believed(self, request: Request) -> Principal:
        header = self._settings.gateway_header
        if not header:
            return Principal("everybody", None)
        names = request.headers.getlist(header)
        if len(names) != 1 or not re.fullmatch(r"[ -~]{1,255}", names[0]):
            raise UnauthenticatedError(f"The gateway does not say who is calling, in {header}")
        return Principal(f"gateway:{names[0]}", None)

    def _machine(self, key: str) -> Principal:
        machine = machine_of(key, self._settings.api_keys)
        if machine is None:
            raise _refused("the API key is not known")
        return Principal(f"key:{machine.name}", machine.scopes)

    async def _holder(self, token: str) -> Principal:
        if self._tokens is None:
            raise _refused("only API keys are taken")
        try:
            verified = await self._tokens.verified(token)
        except BadTokenError as error:
            raise _refused(str(error)) from error
        except IssuerAwayError:
            raise HTTPException(503, "The issuer's keys cannot be read: repeat the request later.") from None
        return Principal(f"oidc:{verified.subject}", verified.scopes)


def _refused(reason: str) -> RefusedTokenError:
    _log.info("identity.refused", reason=reason)
    return RefusedTokenError(f"{reason[0].upper()}{reason[1:]}.")


class _Asks(SecurityBase):
    """The dependency, which is also what the OpenAPI document says about it."""

    model = HTTPBearer(description="An access token of the issuer (JWT), or an API key")
    scheme_name = "bearer"

    async def __call__(self, request: Request, needed: SecurityScopes) -> Principal:
        identity: Identity = request.app.state.identity
        principal = await identity.caller(request)
        if principal.scopes is not None and (missing := set(needed.scopes) - principal.scopes):
            raise MissingScopeError(f"It takes the scope {' '.join(sorted(missing))}.")
        request.state.principal = principal.id
        return principal


_asks = tells_caller(_Asks())


def needs(*scopes: str) -> Any:
    """Asks who is calling, and refuses who lacks one of the scopes: `Annotated[Principal, needs("orders:read")]`.

    A route that need not know who it is has it in `dependencies=[needs("products:write")]`.
    """
    return Security(_asks, scopes=scopes)


def install_identity(app: FastAPI, settings: IdentitySettings) -> None:
    """Let the application ask who is calling, and say so if nobody will be refused.

    Raises:
        ConfigurationError: its routes ask, and nobody could ever answer.
    """
    app.state.identity = Identity(settings)
    if settings.off:
        _log.warning("identity.off", risk="whoever reaches this API without the gateway may do everything, as anybody")
    elif not (settings.issuer or settings.api_keys) and is_asked(app, _asks):
        raise ConfigurationError(
            "IDENTITY__ISSUER: is not set, nor IDENTITY__API_KEYS, so that everybody would be refused; behind a "
            "gateway set IDENTITY__OFF=true"
        )
