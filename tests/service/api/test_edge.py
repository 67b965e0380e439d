"""Hosts, sites and rates that the API takes, where settings say so."""

from __future__ import annotations

import tracemalloc

import pytest

from service.api import create_app
from service.http.edge import Allowance, counted_as
from service.settings import Settings  # noqa: TC001
from tests.service.api.serving import serve


def _with(settings: Settings, **api: object) -> Settings:
    return settings.model_copy(update={"api": settings.api.model_copy(update=api)})


async def test_only_hosts_that_are_named_are_answered_for(settings: Settings) -> None:
    async with serve(create_app(_with(settings, hosts="api.example.com, [::1]"))) as client:
        for host, status in (
            ("api.example.com", 404), ("API.example.com:8443", 404), ("[::1]:80", 404),
            ("evil.example", 400), ("api.example.com.evil.example", 400), ("", 400),
        ):  # fmt: skip
            answer = await client.get("/nothing", headers={"Host": host})
            assert answer.status_code == status, host
            if status == 400:
                assert answer.json()["code"] == "unknown_host"
                assert answer.json()["correlation_id"] == answer.headers["X-Correlation-ID"]
        assert (await client.get("/health/live", headers={"Host": "10.1.2.3"})).status_code == 200


async def test_only_pages_of_sites_that_are_named_may_read(settings: Settings) -> None:
    async with serve(create_app(_with(settings, cors_origins="https://shop.example.com"))) as client:
        for origin, allowed in (
            ("https://shop.example.com", "https://shop.example.com"),
            ("https://evil.example", None),
        ):
            answer = await client.get("/nothing", headers={"Origin": origin})
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        asked = {
            "Origin": "https://shop.example.com",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "idempotency-key, authorization",
        }
        assert (await client.options("/orders", headers=asked)).status_code == 200
    async with serve(create_app(settings)) as client:
        answer = await client.get("/nothing", headers={"Origin": "https://shop.example.com"})
        assert "Access-Control-Allow-Origin" not in answer.headers


async def test_who_asks_too_often_is_refused_and_nobody_else(settings: Settings) -> None:
    """Behind a proxy that is believed, as Uvicorn believes the loopback."""
    async with serve(create_app(_with(settings, rate_limit=2))) as client:

        async def status(forwarded: str) -> int:
            answer = await client.get("/nothing", headers={"X-Forwarded-For": forwarded})
            if answer.status_code == 429:
                assert 0 < int(answer.headers["Retry-After"]) <= 30
                assert answer.json()["code"] == "too_many_requests"
            return answer.status_code

        assert [await status("203.0.113.1") for _ in range(3)] == [404, 404, 429]
        # What a client sends itself stands to the left of what the proxy adds.
        assert [await status(f"198.51.100.{n}, 203.0.113.1") for n in range(3)] == [429, 429, 429]
        assert await status("203.0.113.2") == 404
        assert (await client.get("/health/live", headers={"X-Forwarded-For": "203.0.113.1"})).status_code == 200


async def test_nobody_is_believed_where_no_proxy_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "")
    async with serve(create_app(_with(settings, rate_limit=2))) as client:
        answers = [await client.get("/nothing", headers={"X-Forwarded-For": f"203.0.113.{n}"}) for n in range(3)]
    assert [each.status_code for each in answers] == [404, 404, 429]


async def test_the_documentation_goes_with_production(settings: Settings) -> None:
    production = settings.model_copy(update={"environment": "production"})
    for given, status in ((settings, 200), (production, 404), (_with(production, docs="on"), 200)):
        async with serve(create_app(given)) as client:
            for path in ("/docs", "/redoc", "/openapi.json"):
                assert (await client.get(path)).status_code == status


def test_the_document_knows_of_the_limit(settings: Settings) -> None:
    for limit in (0, 60):
        paths = create_app(_with(settings, rate_limit=limit)).openapi()["paths"]
        assert ("429" in paths["/health/live"]["get"]["responses"]) == (limit > 0)


def test_nothing_stands_there_that_no_setting_asks_for(settings: Settings) -> None:
    stands = [getattr(each.cls, "__name__", "") for each in create_app(settings).user_middleware]
    assert stands == ["RequestContext", "Deadline", "BodyLimit"]


def test_an_allowance_grows_back_evenly() -> None:
    now = 1000.0
    allowance = Allowance(60, clock=lambda: now)
    assert [allowance.take("a") for _ in range(60)] == [0] * 60
    assert allowance.take("a") == pytest.approx(1)
    assert allowance.take("a") == pytest.approx(1), "asking costs nothing"
    now += 1
    assert [allowance.take("a") > 0 for _ in range(2)] == [False, True]
    now += 3600
    assert [allowance.take("a") > 0 for _ in range(61)] == [False] * 60 + [True]


def test_what_is_remembered_is_bounded() -> None:
    now = 1000.0
    allowance = Allowance(1, remembered=1_000, clock=lambda: now)
    tracemalloc.start()
    for number in range(100_000):
        allowance.take(f"2001:db8:{number:x}::")
        if number % 100 == 0:
            assert (allowance.take("busy") > 0) == (number > 0), "who comes often is not forgotten"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("203.0.113.1", "203.0.113.1"),
        ("::ffff:203.0.113.1", "203.0.113.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::"),
        ("x" * 1_000, "x" * 64),
        ("::" + "x" * 1_000, "::" + "x" * 62),
    ],
)
def test_addresses_that_one_caller_has_count_as_one(address: str, counted: str) -> None:
    assert counted_as({"client": (address, 1)}) == counted
    assert counted_as({"client": None}) == ""
