"""The issuer's public keys, as this process knows them.

What must stay true: while the issuer is away, the keys that were read go on for a day. However many requests come, and
with whatever key IDs, the issuer is asked by one at a time and no sooner than `PAUSE` after the last time. The event
loop waits for nothing, and a request no longer than `WAIT`. Only public keys get in: a secret one (`oct`) in the list
would let whoever reads the list sign.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import jwt

from service.errors import ServiceError
from service.network.urls import check_keys
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from service.settings import IdentitySettings

PAUSE = 10.0
"""Seconds between two looks at the issuer's keys."""
REFRESH_AFTER = 600.0
"""Seconds until keys are looked at again, and at most so long a withdrawn one is believed."""
KEEP = 86_400.0
"""Seconds for which keys are believed that could not be looked at again."""
WAIT = 4.0
"""Seconds a request waits for keys."""

_CONNECT_WITHIN = 3.0
_MAX_BYTES = 262_144
_MIN_RSA_BITS = 2048
ALGORITHMS = [
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
]  # fmt: skip
"""None in which the key that verifies could sign."""

_log = get_logger(__name__)


class IssuerAwayError(ServiceError):
    """The issuer's keys could not be read, so that nothing can be said about a token."""


class IssuerKeys:
    """Public keys by their ID."""

    def __init__(self, settings: IdentitySettings) -> None:
        self._settings = settings
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._failed = False
        self._edition = 0

    def edition(self) -> int:
        """Another number whenever keys were withdrawn or added. Ask at every request: this looks for new ones too."""
        age = time.monotonic() - self._read_at
        if age > REFRESH_AFTER:
            self._look()
        if age > KEEP and self._keys:
            self._keys, self._edition = {}, self._edition + 1
        return self._edition

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """The key, looked for at the issuer if it is not known; `None` if the issuer has none of this ID.

        Raises:
            IssuerAwayError: the issuer could not be asked.
        """
        self.edition()
        if key_id in self._keys:
            return self._keys[key_id]
        reading = self._look()
        if reading is not None:
            await asyncio.wait({reading}, timeout=WAIT)
        if key_id not in self._keys and (self._failed or self._reading is not None):
            raise IssuerAwayError("the issuer's keys cannot be read")
        return self._keys.get(key_id)

    def _look(self) -> asyncio.Task[None] | None:
        """The look that is under way, or a new one, unless the last one was just now."""
        if self._reading is None and time.monotonic() - self._tried_at > PAUSE:
            self._tried_at = time.monotonic()
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        try:
            keys = await asyncio.to_thread(_read_keys, self._settings)
        except Exception as error:  # noqa: BLE001  whatever is wrong out there, the keys that are known go on
            self._failed = True
            _log.warning("identity.keys_unread", issuer=self._settings.issuer, error=f"{type(error).__name__}: {error}")
        else:
            self._failed, self._read_at = False, time.monotonic()
            if _material(keys) != _material(self._keys):
                self._keys, self._edition = keys, self._edition + 1
                _log.info("identity.keys_read", issuer=self._settings.issuer, key_ids=sorted(keys))
        finally:
            self._reading = None


def _material(keys: Mapping[str, jwt.PyJWK]) -> dict[str, Any]:
    return {key_id: (key.algorithm_name, key.key) for key_id, key in keys.items()}


def _read_keys(settings: IdentitySettings) -> dict[str, jwt.PyJWK]:
    url = settings.keys_url or _discovered(settings.issuer)
    keys = {}
    for each in _json_at(url)["keys"]:
        key = _usable(each)
        if key is not None:
            keys[str(each.get("kid", ""))] = key
    if not keys:
        raise ValueError(f"{url} has no key that could be used")
    return keys


def _discovered(issuer: str) -> str:
    document = _json_at(f"{issuer.rstrip('/')}/.well-known/openid-configuration")
    url: str = document["jwks_uri"]
    if document["issuer"] != issuer or url.startswith("file"):
        raise ValueError(f"the discovery document is of another issuer, {document['issuer']!r:.200}")
    check_keys(url)
    return url


def _usable(jwk: dict[str, Any]) -> jwt.PyJWK | None:
    if jwk.get("use", "sig") != "sig" or jwk.get("kty") == "oct":
        return None
    try:
        key = jwt.PyJWK(jwk)
    except jwt.PyJWTError:
        return None  # of a kind that is not known here
    large_enough = jwk["kty"] != "RSA" or key.key.key_size >= _MIN_RSA_BITS
    return key if key.algorithm_name in ALGORITHMS and large_enough else None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What was checked of the URL would not hold for where it leads."""

    def redirect_request(self, *_: Any) -> None: ...


def _json_at(url: str) -> Any:
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310  `check_keys` did
    content, deadline = b"", time.monotonic() + WAIT
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=_CONNECT_WITHIN) as answer:
        while part := answer.read1(65_536):
            content += part
            if len(content) > _MAX_BYTES or time.monotonic() > deadline:
                raise ValueError(f"{url} is too large or too slow")
    return json.loads(content)
