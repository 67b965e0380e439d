"""An issuer: keys of several kinds, tokens that are right or wrong, and an HTTP server that publishes the keys."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["AUDIENCE", "KeyServer", "SigningKey", "hmac_token", "key_server", "part"]

AUDIENCE = "the-service"


def part(content: object) -> str:
    """A segment of a token."""
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


class SigningKey:
    """A private key, `RS256`, `ES256` or `EdDSA`, and the tokens that it signs."""

    def __init__(self, key_id: str, algorithm: str = "RS256", *, bits: int = 2048) -> None:
        self.key_id, self.algorithm = key_id, algorithm
        self._private: Any
        match algorithm:
            case "ES256":
                self._private, public = ec.generate_private_key(ec.SECP256R1()), ECAlgorithm
            case "EdDSA":
                self._private, public = ed25519.Ed25519PrivateKey.generate(), OKPAlgorithm  # type: ignore[assignment]
            case _:
                self._private, public = rsa.generate_private_key(65_537, bits), RSAAlgorithm  # type: ignore[assignment]
        written = public.to_jwk(self._private.public_key(), as_dict=True)
        self.public: dict[str, Any] = {**written, "kid": key_id, "use": "sig"}

    @property
    def pem(self) -> bytes:
        """The public key, as anybody can have it."""
        pem: bytes = self._private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return pem

    def sign(self, claims: dict[str, Any], **headers: Any) -> str:
        """A token with these claims."""
        return jwt.encode(claims, self._private, self.algorithm, headers={"kid": self.key_id} | headers)


def hmac_token(secret: bytes, claims: dict[str, Any], key_id: str) -> str:
    """A token that is signed with a secret, whatever that is."""
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': key_id})}.{part(claims)}"
    signature = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


@dataclass
class KeyServer:
    """Publishes keys over HTTP, well or badly."""

    url: str
    keys: list[dict[str, Any]] = field(default_factory=list)
    how: str = "well"
    """`well`, `hang` (no answer), `drip` (a byte at a time), `huge`, `elsewhere` (a redirect), `impostor` (discovery),
    `failing` (500), `no HTTP`; otherwise the body itself."""
    asked: int = 0
    """Requests so far."""

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Claims of a good token, with some replaced; `None` leaves one out."""
        now = int(time.time())
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "scope": "things:write", "iat": now, "exp": now + 600}
        return {name: value for name, value in (good | changes).items() if value is not None}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        self.asked += 1
        content: Any = {"keys": self.keys}
        if path.endswith(b"openid-configuration"):
            named = "https://impostor.example" if self.how == "impostor" else self.url
            content = {"issuer": named, "jwks_uri": f"{self.url}/keys"}
        body = self.how.encode() if self.how.startswith(("{", "[")) else json.dumps(content).encode()
        if self.how == "huge":
            body += b" " * 300_000
        moved = self.how == "elsewhere" and path == b"/keys"
        status = "302 Found\r\nLocation: /others" if moved else "500 No" if self.how == "failing" else "200 OK"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        try:
            if self.how == "hang":
                await reader.read()
            elif self.how == "drip":
                writer.write(head)
                for byte in body:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
            else:
                writer.write(b"\x16\x03\n\n" if self.how == "no HTTP" else head + body)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def key_server(*keys: SigningKey) -> AsyncIterator[KeyServer]:
    """A server that publishes these keys, until the end of the block."""
    published = KeyServer("", [key.public for key in keys])
    listening = await asyncio.start_server(published.answer, "127.0.0.1", 0)
    published.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield published
    finally:
        listening.close()
