"""An issuer for one developer's machine: a key of the clone's own, and tokens that are signed with it.

What must stay true: the private key is made here and leaves its folder never, so that no two clones, and no server,
believe the same tokens.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from fastapi import FastAPI
from jwt.algorithms import ECAlgorithm

from service import domains

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

ISSUER = "make dev"
AUDIENCE = "service"
LASTS = 86_400
"""Seconds."""


class DevIssuer:
    """Signs tokens with the key in a folder, which is made if there is none."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._private, self._public = folder / "issuer.pem", folder / "issuer.jwks.json"
        if not self._public.exists():
            self._make()

    @property
    def settings(self) -> dict[str, str]:
        """Those of a service that believes these tokens."""
        return {"issuer": ISSUER, "audience": AUDIENCE, "keys_url": self._public.resolve().as_uri()}

    @property
    def variables(self) -> dict[str, str]:
        """The same for its environment."""
        return {f"IDENTITY__{name.upper()}": value for name, value in self.settings.items()}

    def token(self, subject: str, scopes: Iterable[str]) -> str:
        """A token that lasts a day."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "scope": " ".join(scopes)}
        key = load_pem_private_key(self._private.read_bytes(), None)
        return jwt.encode(claims | {"iat": now, "exp": now + LASTS}, key, "ES256", headers={"kid": "dev"})  # type: ignore[arg-type]

    def _make(self) -> None:
        key = generate_private_key(SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with os.fdopen(os.open(self._private, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(pem)
        public = ECAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": "dev", "use": "sig", "alg": "ES256"}
        self._public.write_text(json.dumps({"keys": [public]}))


def is_ours(environment: Mapping[str, str]) -> bool:
    """Whether the developer has set nothing about callers, so that these tokens are right."""
    return not any(name.startswith("IDENTITY__") for name in environment)


def every_scope() -> list[str]:
    """All that the domains' routes ask for."""
    app = FastAPI()
    for router in domains.routers():
        app.include_router(router)
    operations = [each for methods in app.openapi()["paths"].values() for each in methods.values()]
    asked = [scopes for each in operations for one in each.get("security", []) for scopes in one.values()]
    return sorted({scope for scopes in asked for scope in scopes})
