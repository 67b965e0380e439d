"""Bearer tokens of an OIDC issuer: signed JWTs that say who is calling, until when, and for what.

What must stay true: which algorithm verifies is decided by the issuer's key, never by the token; and a token is
believed only if it names this issuer and this service, and has a subject and an end. What was verified is remembered by
its hash until it ends or the issuer's keys change, because verifying costs as much as a twentieth of a request.
"""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jwt

from service.errors import ServiceError
from service.identity.issuer_keys import ALGORITHMS, IssuerKeys

if TYPE_CHECKING:
    from service.settings import IdentitySettings

MAX_LENGTH = 8_192
LEEWAY = 30.0
"""Seconds by which the clocks of issuer and service may differ."""
REMEMBERED = 4_096
"""Verified tokens at most."""

_SUBJECT = re.compile(r"[ -~]{1,255}")
_REASONS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidIssuerError: "it is of another issuer",
    jwt.InvalidAudienceError: "it is meant for another service",
    jwt.MissingRequiredClaimError: "it lacks one of exp, iss, aud and sub",
    jwt.InvalidAlgorithmError: "its algorithm is not that of the key",
    jwt.InvalidSignatureError: "its signature is wrong",
}


class BadTokenError(ServiceError):
    """A token that is not believed; the message says why."""


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says that is believed.

    Attributes:
        subject: Who is calling, as the issuer calls them.
        scopes: What for.
        expires: Unix time in seconds.
    """

    subject: str
    scopes: frozenset[str]
    expires: float


class Tokens:
    """Verifies tokens of one issuer."""

    def __init__(self, settings: IdentitySettings) -> None:
        self._settings = settings
        self._keys = IssuerKeys(settings)
        self._verified: dict[bytes, Token] = {}
        self._edition = 0

    async def verified(self, given: str) -> Token:
        """What the token says.

        Raises:
            BadTokenError: it is not believed.
            IssuerAwayError: that cannot be said now.
        """
        if self._edition != (edition := self._keys.edition()):
            self._verified, self._edition = {}, edition
        fingerprint = hashlib.sha256(given.encode()).digest()
        known = self._verified.get(fingerprint)
        if known is not None and known.expires + LEEWAY > time.time():
            return known
        token = await self._verify(given)
        self._verified.pop(fingerprint, None)
        if len(self._verified) >= REMEMBERED:
            del self._verified[next(iter(self._verified))]
        if self._edition == self._keys.edition():
            self._verified[fingerprint] = token
        return token

    async def _verify(self, given: str) -> Token:
        if len(given) > MAX_LENGTH:
            raise BadTokenError(f"it has more than {MAX_LENGTH} characters")
        try:
            key_id: str = jwt.get_unverified_header(given).get("kid", "")
            key = await self._keys.get(key_id)
            if key is None:
                raise BadTokenError("its key is not one of the issuer's")
            return _read(self._decoded(given, key))
        except (jwt.PyJWTError, ValueError, OverflowError) as error:
            raise BadTokenError(_REASONS.get(type(error), "it cannot be read")) from error

    def _decoded(self, given: str, key: jwt.PyJWK) -> dict[str, Any]:
        return jwt.decode(
            given,
            key,
            algorithms=ALGORITHMS,
            audience=self._settings.audience,
            issuer=self._settings.issuer,
            leeway=LEEWAY,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )


def _read(claims: dict[str, Any]) -> Token:
    # `scope` is RFC 9068's, words in one string; some issuers call it `scp`, or make a list of it.
    scope = claims.get("scope", claims.get("scp", ""))
    scopes = scope.split() if isinstance(scope, str) else scope
    if not isinstance(scopes, list) or not all(isinstance(each, str) for each in scopes):
        raise BadTokenError("its scopes cannot be read")
    if not _SUBJECT.fullmatch(claims["sub"]):  # what is stored beside a row has to be storable
        raise BadTokenError("its subject is not 1 to 255 ASCII characters")
    return Token(claims["sub"], frozenset(scopes), float(claims["exp"]))
