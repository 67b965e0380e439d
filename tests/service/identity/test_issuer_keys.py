"""The issuer changes its keys, is away, is slow, or answers with nonsense."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.identity import issuer_keys
from tests.service.api.problems import assert_problem
from tests.service.identity.issuing import AUDIENCE, KeyServer, SigningKey, key_server
from tests.waiting import until

if TYPE_CHECKING:
    import httpx

    from tests.service.identity.conftest import Serve


async def ask(client: httpx.AsyncClient, token: str) -> int:
    """The status that the token gets."""
    return (await client.get("/me", headers={"Authorization": f"Bearer {token}"})).status_code


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keys are looked at again whenever there is a reason to."""
    monkeypatch.setattr(issuer_keys, "PAUSE", -1.0)
    return monkeypatch


async def test_the_keys_are_asked_for_once(client: httpx.AsyncClient, server: KeyServer, key: SigningKey) -> None:
    tokens = [key.sign(server.claims(sub=f"user-{number}")) for number in range(20)]
    assert set(await asyncio.gather(*(ask(client, token) for token in tokens))) == {200}
    assert server.asked == 1


async def test_a_new_key_is_found_when_a_token_names_it(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, hasty: pytest.MonkeyPatch
) -> None:
    old, second = key.sign(server.claims()), SigningKey("second", "ES256")
    assert await ask(client, old) == 200
    server.keys.append(second.public)
    assert await ask(client, second.sign(server.claims())) == 200
    assert await ask(client, old) == 200  # both, while the issuer has both
    assert server.asked == 2


async def test_a_withdrawn_key_is_forgotten_with_the_tokens_that_it_signed(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, hasty: pytest.MonkeyPatch
) -> None:
    token = key.sign(server.claims())
    assert await ask(client, token) == 200
    server.keys = [SigningKey("second", "ES256").public]
    assert await ask(client, token) == 200  # nothing is known of it yet
    hasty.setattr(issuer_keys, "REFRESH_AFTER", 0.0)

    async def refused() -> bool:
        return await ask(client, token) == 401

    await until(refused, what="the key to be forgotten")


async def test_another_key_under_an_old_name_counts_as_new(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, hasty: pytest.MonkeyPatch
) -> None:
    token, other = key.sign(server.claims()), SigningKey("first")
    assert await ask(client, token) == 200
    server.keys = [other.public]
    hasty.setattr(issuer_keys, "REFRESH_AFTER", 0.0)

    async def exchanged() -> bool:
        return (await ask(client, token), await ask(client, other.sign(server.claims()))) == (401, 200)

    await until(exchanged, what="the keys to be exchanged")


async def test_while_the_issuer_is_away_known_keys_go_on(
    serve_with: Serve, key: SigningKey, hasty: pytest.MonkeyPatch
) -> None:
    async with key_server(key) as server:
        settings = {"issuer": server.url, "audience": AUDIENCE, "keys_url": f"{server.url}/keys"}
        serving = serve_with(**settings)
        client = await serving.__aenter__()
        assert await ask(client, key.sign(server.claims())) == 200
    try:
        hasty.setattr(issuer_keys, "REFRESH_AFTER", 0.0)
        for number in range(5):
            assert await ask(client, key.sign(server.claims(sub=f"user-{number}"))) == 200
        headers = {"Authorization": f"Bearer {SigningKey('unheard-of', 'ES256').sign(server.claims())}"}
        answer = await client.get("/me", headers=headers)
        assert_problem(answer, 503, "service_unavailable")
        assert answer.headers["Retry-After"]
        hasty.setattr(issuer_keys, "KEEP", 0.0)
        assert await ask(client, key.sign(server.claims())) == 503
    finally:
        await serving.__aexit__(None, None, None)


@pytest.mark.parametrize(
    "how",
    [
        "hang",
        "drip",
        "huge",
        "elsewhere",
        "failing",
        "no HTTP",
        "{",
        "[1]",
        '{"keys": [1]}',
        '{"keys": []}',
        "[" * 99_999,
    ],
    ids=lambda how: how[:14],
)
async def test_an_issuer_that_does_not_answer_well_delays_nobody(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(issuer_keys, "WAIT", 0.5)
    monkeypatch.setattr(issuer_keys, "_CONNECT_WITHIN", 1.0)
    server.how = how
    asking = [asyncio.create_task(ask(client, key.sign(server.claims(sub=f"u{number}")))) for number in range(10)]
    await until(lambda: server.asked > 0, what="the issuer to be asked")
    slowest = 0.0
    while not all(each.done() for each in asking):
        began = time.perf_counter()
        assert (await client.get("/health/live")).status_code == 200
        slowest = max(slowest, time.perf_counter() - began)
    assert {each.result() for each in asking} == {503}
    assert slowest < issuer_keys.WAIT
    assert server.asked == 1
    # Once it answers well, all is well.
    server.how = "well"
    monkeypatch.setattr(issuer_keys, "PAUSE", -1.0)

    async def well() -> bool:
        return await ask(client, key.sign(server.claims())) == 200

    await until(well, what="the keys")


async def test_made_up_key_ids_do_not_make_us_a_nuisance(
    client: httpx.AsyncClient, server: KeyServer, key: SigningKey
) -> None:
    assert await ask(client, key.sign(server.claims())) == 200
    tokens = [SigningKey(str(uuid4()), "ES256").sign(server.claims()) for _ in range(50)]
    assert set(await asyncio.gather(*(ask(client, token) for token in tokens))) == {401}
    assert server.asked == 1
    assert await ask(client, key.sign(server.claims(sub="bob"))) == 200


async def test_the_discovery_document_says_where_the_keys_are(
    serve_with: Serve, server: KeyServer, key: SigningKey
) -> None:
    async with serve_with(issuer=server.url, audience=AUDIENCE) as client:
        assert await ask(client, key.sign(server.claims())) == 200
        assert server.asked == 2


async def test_a_discovery_document_of_somebody_else_is_not_believed(
    serve_with: Serve, server: KeyServer, key: SigningKey
) -> None:
    server.how = "impostor"
    async with serve_with(issuer=server.url, audience=AUDIENCE) as client:
        assert await ask(client, key.sign(server.claims())) == 503
        assert server.asked == 1
