"""Tokens that somebody made up, stole, or got for something else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from service.identity import tokens
from service.identity.tokens import MAX_LENGTH, Tokens
from service.settings import IdentitySettings
from tests.service.api.problems import assert_problem
from tests.service.identity.issuing import AUDIENCE, KeyServer, SigningKey, hmac_token, part

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx

    from service.dev.issuer import DevIssuer
    from tests.service.identity.conftest import Serve


async def ask(client: httpx.AsyncClient, token: str, path: str = "/me") -> httpx.Response:
    """Who the API thinks that the token's holder is."""
    return await client.get(path, headers={"Authorization": f"Bearer {token}"})


async def assert_refused(client: httpx.AsyncClient, token: str, why: str = "") -> None:
    """Fail unless the token is refused, for this reason."""
    answer = await ask(client, token)
    body = assert_problem(answer, 401, "token_refused")
    assert why in body["detail"].lower()
    assert answer.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
async def test_a_token_of_the_issuer_says_who_is_calling(
    client: httpx.AsyncClient, server: KeyServer, algorithm: str
) -> None:
    key = SigningKey("mine", algorithm)
    server.keys = [key.public]
    for _ in range(2):  # verified, and remembered
        answer = await ask(client, key.sign(server.claims(sub="auth0|ada")))
        assert (answer.status_code, answer.json()) == (200, ["oidc:auth0|ada", "things:write"])


@pytest.mark.parametrize(
    "claims", [{"scope": "a b"}, {"scope": None, "scp": ["b", "a"]}, {"scope": None, "scp": "b a"}]
)
async def test_scopes_come_in_several_spellings(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, claims: dict[str, Any]
) -> None:
    assert (await ask(client, key.sign(server.claims(**claims)))).json() == ["oidc:ada", "a", "b"]


async def test_an_audience_may_be_one_of_several(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    assert (await ask(client, key.sign(server.claims(aud=["other", AUDIENCE])))).status_code == 200


async def test_without_a_token_nobody_is_calling(client: httpx.AsyncClient) -> None:
    answer = await client.get("/me")
    assert_problem(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"] == "Bearer"


_NOW = time.time()
_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"exp": int(_NOW) - 60}, "expired"),
    "not yet valid": ({"nbf": int(_NOW) + 3_600}, "not valid yet"),
    "made in the future": ({"iat": int(_NOW) + 3_600}, "not valid yet"),
    "other issuer": ({"iss": "https://other.example"}, "another issuer"),
    "other audience": ({"aud": "another-service"}, "another service"),
    "part of the audience": ({"aud": AUDIENCE[:-1]}, "another service"),
    "no end": ({"exp": None}, "lacks"),
    "no issuer": ({"iss": None}, "lacks"),
    "no audience": ({"aud": None}, "lacks"),
    "no subject": ({"sub": None}, "lacks"),
    "empty subject": ({"sub": ""}, "subject"),
    "subject that cannot be stored": ({"sub": "a\x00b"}, "subject"),
    "subject that is no text": ({"sub": {"a": 1}}, "cannot be read"),
    "endless": ({"exp": float("inf")}, "cannot be read"),
    "end that is no time": ({"exp": "soon"}, "cannot be read"),
    "scopes that are no words": ({"scope": {"things:write": True}}, "scopes"),
    "scopes that are numbers": ({"scope": [1]}, "scopes"),
}


@pytest.mark.parametrize("name", _CLAIMS)
async def test_what_it_says_must_hold(client: httpx.AsyncClient, server: KeyServer, key: SigningKey, name: str) -> None:
    claims, why = _CLAIMS[name]
    await assert_refused(client, key.sign(server.claims(**claims)), why)


async def test_a_token_that_was_believed_ends(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = key.sign(server.claims())
    for _ in range(2):  # the first one comes before the keys, and is not remembered
        assert (await ask(client, token)).status_code == 200
    later = time.time() + 700
    monkeypatch.setattr("service.identity.tokens.time.time", lambda: later)
    monkeypatch.setattr("jwt.api_jwt.datetime", _Later(later))
    await assert_refused(client, token, "expired")


async def test_no_more_than_so_many_are_remembered(issuer: DevIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED", 3)
    verifier = Tokens(IdentitySettings.model_validate(issuer.settings))
    for name in ("ada", "bob", "cleo", "dan", "eve", "ada"):
        assert (await verifier.verified(issuer.token(name, []))).subject == name
    assert len(verifier._verified) == 3


class _Later:
    """The clock of PyJWT."""

    def __init__(self, now: float) -> None:
        self._now = now

    def now(self, tz: object) -> _Later:
        return self

    def timestamp(self) -> float:
        return self._now


async def test_unsigned(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    for algorithm in ("none", "None", "NONE", ""):
        token = f"{part({'alg': algorithm, 'typ': 'JWT', 'kid': 'first'})}.{part(server.claims())}."
        await assert_refused(client, token, "algorithm")
    head = part({"typ": "JWT", "kid": "first"})
    await assert_refused(client, f"{head}.{part(server.claims())}.{'a' * 342}")


async def test_signed_with_the_public_key_as_if_it_were_a_secret(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey
) -> None:
    for secret in (key.pem, key.pem.strip(), key.public["n"].encode(), b""):
        await assert_refused(client, hmac_token(secret, server.claims(), "first"), "algorithm")


async def test_a_secret_among_the_keys_is_none(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    server.keys = [{"kty": "oct", "kid": "secret", "k": "c2VjcmV0", "alg": "HS256"}, key.public]
    await assert_refused(client, hmac_token(b"secret", server.claims(), "secret"), "issuer's")


async def test_another_key_under_the_same_name(client: httpx.AsyncClient, server: KeyServer) -> None:
    await assert_refused(client, SigningKey("first").sign(server.claims()), "signature")
    await assert_refused(client, SigningKey("first", "ES256").sign(server.claims()), "algorithm")


async def test_a_key_that_the_token_brings_along_is_not_used(client: httpx.AsyncClient, server: KeyServer) -> None:
    mine = SigningKey("first")
    for headers in ({"jwk": mine.public}, {"jku": f"{server.url}/mine"}, {"x5u": f"{server.url}/mine"}):
        await assert_refused(client, mine.sign(server.claims(), **headers), "signature")
    assert server.asked == 1


async def test_a_key_too_short_to_be_safe_is_not_used(client: httpx.AsyncClient, server: KeyServer) -> None:
    short = SigningKey("short", bits=1024)
    server.keys.append(short.public)
    with pytest.warns(Warning, match="1024 bits"):
        token = short.sign(server.claims())
    await assert_refused(client, token, "issuer's")


async def test_changed_on_the_way(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    head, _, signature = key.sign(server.claims()).split(".")
    await assert_refused(client, f"{head}.{part(server.claims(sub='root'))}.{signature}", "signature")


async def test_an_extension_that_must_be_understood(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey
) -> None:
    await assert_refused(client, key.sign(server.claims(), crit=["http://x.example/y"], **{"http://x.example/y": 1}))


_NONSENSE: dict[str, Callable[[str], str]] = {
    "a word": lambda _: "word",
    "dots": lambda _: "..",
    "two parts": lambda good: good.rpartition(".")[0],
    "five parts": lambda good: f"{good}.a.b",
    "no JSON": lambda good: f"e30K{good}",
    "a list": lambda good: f"{part([1])}.{good.partition('.')[2]}",
    "a key ID that is no text": lambda good: f"{part({'alg': 'RS256', 'kid': [1]})}.{good.partition('.')[2]}",
    "an algorithm that is no text": lambda good: f"{part({'alg': ['RS256'], 'kid': 'first'})}.{good.partition('.')[2]}",
    "deep": lambda good: f"{part(None).join(['W1tb'] * 1_000)}.{good.partition('.')[2]}",
    "no base64": lambda good: good.replace(".", ".%", 1),
    "detached": lambda good: f"{part({'alg': 'RS256', 'kid': 'first', 'b64': False, 'crit': ['b64']})}..{good[-342:]}",
}


@pytest.mark.parametrize("name", _NONSENSE)
async def test_what_is_no_token(client: httpx.AsyncClient, server: KeyServer, key: SigningKey, name: str) -> None:
    await assert_refused(client, _NONSENSE[name](key.sign(server.claims())))


async def test_a_huge_one(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    """Too long for us, though it is well signed; and too long for the protocol."""
    token = key.sign(server.claims(more="x" * MAX_LENGTH))
    await assert_refused(client, token, "8192")
    assert server.asked == 0
    assert (await ask(client, "x" * 40_000)).status_code == 431


@pytest.mark.parametrize("headers", [["Basic YTpi"], ["Bearer"], ["Bearer a b"], ["Bearer x", "Bearer {}"], ["{}"]])
async def test_a_header_that_says_something_else(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, headers: list[str]
) -> None:
    given = [("Authorization", each.replace("{}", key.sign(server.claims()))) for each in headers]
    assert_problem(await client.get("/me", headers=given), 401, "token_refused")


async def test_who_lacks_a_scope_is_told_which(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    for scope in ("", "things:read", "things", "things:write:all", "THINGS:WRITE"):
        headers = {"Authorization": f"Bearer {key.sign(server.claims(scope=scope))}"}
        answer = await client.post("/things", headers=headers)
        assert "things:write" in assert_problem(answer, 403, "missing_scope")["detail"]
        assert answer.headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope"'


async def test_a_key_s_response_is_its_callers(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    def caller(**claims: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {key.sign(server.claims(**claims))}", "Idempotency-Key": "guessed"}

    first, again, other = [await client.post("/things", headers=caller(sub=sub)) for sub in ("ada", "ada", "bob")]
    assert [answer.status_code for answer in (first, again, other)] == [201] * 3
    assert first.json() == again.json() != other.json()
    assert [answer.headers.get("Idempotency-Replayed") for answer in (first, again, other)] == [None, "true", None]
    # Nor to those who may not ask, however well they know the key.
    assert_problem(await client.post("/things", headers={"Idempotency-Key": "guessed"}), 401, "unauthenticated")
    assert_problem(await client.post("/things", headers=caller(sub="ada", scope="")), 403, "missing_scope")


async def test_where_only_machines_may_call_a_token_is_refused(
    serve_with: Serve, server: KeyServer, key: SigningKey
) -> None:
    async with serve_with(api_keys=[{"name": "billing", "sha256": "0" * 64}]) as client:
        await assert_refused(client, key.sign(server.claims()), "api keys")
