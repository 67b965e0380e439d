"""Who comes in, what they may do, and from where."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from fastapi.routing import iter_route_contexts
from pydantic import ValidationError

from service.console.console_app import create_console
from service.console.doorkeeper import LOGIN
from service.console.operators import COOKIE, SECRET_HEADER
from service.console.passwords import hashed
from service.errors import ConfigurationError
from service.settings import ConsoleSettings, ConsoleUser
from tests.service.api.serving import serve
from tests.service.console.conftest import PROXY_SECRET

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx
    from fastapi import FastAPI

    from service.settings import Settings
    from tests.service.console.conftest import As, MakeConsole
    from tests.service.console.ledger_rows import LedgerRows

PASSWORD = "correct horse"
SECRET_WORD = "orders.send_confirmation"
"""What everybody who comes in sees."""


@pytest.fixture
def user() -> ConsoleUser:
    return ConsoleUser(name="ada", scrypt=hashed(PASSWORD), roles=frozenset({"operator"}))


@pytest.fixture
async def outside(make_console: MakeConsole, rows: LedgerRows) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a console behind a proxy, of whom the proxy has said nothing."""
    rows.dead_letters()
    async with serve(make_console()) as client:
        yield client


@pytest.fixture
async def local(make_console: MakeConsole, rows: LedgerRows, user: ConsoleUser) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a console with a local user."""
    rows.dead_letters()
    async with serve(make_console(users=[user])) as client:
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        yield client


def paths(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of each route, with something for what is variable."""
    found = [
        (method, re.sub(r"\{\w+\}", "1", route.path or ""))
        for route in iter_route_contexts(app.routes)
        for method in sorted(route.methods or ())
    ]
    assert ("GET", "/dead-letters/1") in found
    assert ("POST", "/logout") in found
    return found


REFUSED: list[dict[str, Any]] = [
    {},
    {"X-Forwarded-User": "ann", "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: "wrong" * 8, "X-Forwarded-User": "ann", "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: "\xff" * 40, "X-Forwarded-User": "ann", "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: "", "X-Forwarded-User": "ann", "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: PROXY_SECRET, "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: PROXY_SECRET, "X-Forwarded-User": "", "X-Forwarded-Groups": "operator"},
    {SECRET_HEADER: PROXY_SECRET, "X-Forwarded-User": "ann"},
    {SECRET_HEADER: PROXY_SECRET, "X-Forwarded-User": "ann", "X-Forwarded-Groups": "staff, root"},
    {"Cookie": f"{COOKIE}=ann:9999999999:1:1"},
]


@pytest.mark.parametrize("headers", REFUSED, ids=range(len(REFUSED)))
async def test_whom_the_proxy_does_not_name_for_certain_sees_nothing(
    outside: httpx.AsyncClient, make_console: MakeConsole, headers: dict[str, str]
) -> None:
    given = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    for method, path in paths(make_console()):
        if path.startswith("/health/"):
            continue
        answer = await outside.request(method, path, headers={b"Sec-Fetch-Site": b"same-origin"} | given)
        assert answer.status_code in (403, 404), f"{method} {path}"
        assert SECRET_WORD not in answer.text
        assert "<nav" not in answer.text


async def test_a_name_that_is_given_twice_is_nobodys(outside: httpx.AsyncClient, by_proxy: As) -> None:
    twice = [*by_proxy("ann", "viewer").items(), ("X-Forwarded-User", "bob")]
    assert (await outside.get("/", headers=twice)).status_code == 403


async def test_the_secret_alone_is_not_believed_from_another_address(
    make_console: MakeConsole, by_proxy: As, rows: LedgerRows
) -> None:
    async with serve(make_console(proxy="10.0.0.0/8, 192.0.2.7")) as client:
        assert (await client.get("/", headers=by_proxy("ann", "operator"))).status_code == 403


async def test_groups_become_roles_as_the_settings_say(make_console: MakeConsole, by_proxy: As) -> None:
    groups = {"support": ["viewer"], "on-call": ["operator", "payload"]}
    async with serve(make_console(groups=groups)) as client:
        page = await client.get("/", headers=by_proxy("ann", "support", "others"))
        assert "ann · viewer<" in page.text
        page = await client.get("/", headers=by_proxy("bob", "on-call"))
        assert "bob · operator, payload<" in page.text
        assert (await client.get("/", headers=by_proxy("eve", "operator"))).status_code == 403


async def test_a_local_user_logs_in_and_out(local: httpx.AsyncClient) -> None:
    answer = await local.get("/dead-letters?consumer=a%26b")
    assert answer.status_code == 303
    assert SECRET_WORD not in answer.text
    form = (await local.get(answer.headers["location"])).text
    assert 'name="to" value="/dead-letters?consumer=a%26b"' in form
    assert "<nav" not in form
    refused = await local.post(LOGIN, data={"name": "ada", "password": "wrong", "to": "/"})
    assert refused.status_code == 401
    assert COOKIE not in local.cookies
    answer = await local.post(LOGIN, data={"name": "ada", "password": PASSWORD, "to": "/dead-letters?consumer=a%26b"})
    assert answer.headers["location"] == "/dead-letters?consumer=a%26b"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    page = await local.get("/dead-letters")
    assert SECRET_WORD in page.text
    answer = await local.post("/logout", data={"token": _token(page.text)})
    assert answer.status_code == 303
    assert (await local.get("/")).status_code == 303


def _token(html: str) -> str:
    found = re.search(r'name="token" value="([0-9a-f]{64})"', html)
    assert found
    return found[1]


@pytest.mark.parametrize("to", ["//evil.example", "/\\evil.example", "https://evil.example", "/\t/evil.example", ""])
async def test_the_login_leads_to_no_other_site(local: httpx.AsyncClient, to: str) -> None:
    answer = await local.post(LOGIN, data={"name": "ada", "password": PASSWORD, "to": to})
    assert answer.headers["location"] == "/"


async def test_a_session_ends_and_a_page_that_shows_itself_again_leads_to_the_login(
    make_console: MakeConsole, user: ConsoleUser
) -> None:
    async with serve(make_console(users=[user], session=0.01)) as client:
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        answer = await client.post(LOGIN, data={"name": "ada", "password": PASSWORD})
        session = answer.headers["set-cookie"].partition(";")[0]
        answer = await client.get("/", headers={"Cookie": session, "HX-Request": "true"})
        assert (answer.status_code, answer.headers["hx-refresh"]) == (401, "true")
        assert (await client.get("/", headers={"Cookie": session})).status_code == 303
        answer = await client.post("/logout", headers={"Cookie": session})
        assert answer.status_code == 401
        assert "nothing was done" in answer.text


async def test_a_session_is_good_for_its_user_alone_and_as_long_as_their_password(
    make_console: MakeConsole, user: ConsoleUser
) -> None:
    users = {"users": [user, user.model_copy(update={"name": "bob"})], "secret": "k" * 32}
    async with serve(make_console(**users)) as client:
        client.headers["Origin"] = str(client.base_url).rstrip("/")
        await client.post(LOGIN, data={"name": "ada", "password": PASSWORD})
        session = client.cookies[COOKIE].strip('"')
        assert (await client.get("/")).status_code == 200
        client.cookies.clear()
        name, ends, nonce, signature = session.split(":")
        for forged in (
            f"bob:{ends}:{nonce}:{signature}", f"{name}:9999999999:{nonce}:{signature}", f"{name}:{ends}:{nonce}:",
            f"{name}:{ends}:{nonce}:é", "é", "", ":::", "ada",
        ):  # fmt: skip
            answer = await client.get("/", headers={b"Cookie": f"{COOKIE}={forged}".encode()})
            assert answer.status_code == 303, forged
    for changed, status in ((user, 200), (user.model_copy(update={"scrypt": hashed("another")}), 303)):
        async with serve(make_console(users=[changed], secret="k" * 32)) as client:
            assert (await client.get("/", headers={"Cookie": f"{COOKIE}={session}"})).status_code == status


async def test_passwords_cannot_be_tried_without_end(local: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.console.passwords._COST", {"n": 2, "r": 1, "p": 1})
    statuses = [(await local.post(LOGIN, data={"name": f"user{n}", "password": "x"})).status_code for n in range(11)]
    assert statuses == [401] * 10 + [429]


FOREIGN: list[dict[str, str | None]] = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
    {"Origin": None},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": None, "Sec-Fetch-Site": "none"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=range(len(FOREIGN)))
async def test_a_form_of_another_site_is_refused(console: httpx.AsyncClient, headers: dict[str, str | None]) -> None:
    if headers.get("Origin", "") is None:
        del console.headers["Origin"]
    given = {name: value for name, value in headers.items() if value is not None}
    answer = await console.post("/logout", data={"token": "0" * 64}, headers=given)
    assert answer.status_code == 403
    assert "not sent by a page of the console" in answer.text


async def test_a_form_needs_the_token_of_its_own_session(local: httpx.AsyncClient) -> None:
    tokens = []
    for _ in range(2):
        local.cookies.clear()
        await local.post(LOGIN, data={"name": "ada", "password": PASSWORD})
        tokens.append(_token((await local.get("/")).text))
    assert tokens[0] != tokens[1]
    for wrong in ({"token": tokens[0]}, {"token": ""}, {"why": "x"}):
        assert (await local.post("/logout", data=wrong)).status_code == 403
    assert (await local.post("/logout", json={"token": tokens[1]})).status_code == 415
    assert (await local.post("/logout", data={"token": tokens[1]})).status_code == 303


async def test_only_its_own_names_are_answered(console: httpx.AsyncClient) -> None:
    assert (await console.get("/", headers={"Host": "evil.example"})).status_code == 400
    assert (await console.get("/", headers={"Host": "localhost"})).status_code == 200


async def test_every_answer_tells_the_browser_to_run_nothing_but_files_of_the_console(
    console: httpx.AsyncClient,
) -> None:
    for path in ("/", "/dead-letters", "/events", "/nothing", "/dead-letters/17", "/login", "/static/console.js"):
        answer = await console.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        for tag in re.findall(r"<(?:script|link|img|form)[^>]*", answer.text):
            assert not re.search(r"(?:src|href|action)=\"?(?:https?:)?//", tag), tag
        if path != "/static/console.js":
            assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", answer.text), path


async def test_what_a_page_needs_is_served_to_everybody(outside: httpx.AsyncClient) -> None:
    for name in ("console.css", "console.js", "htmx.min.js", "icon.svg"):
        assert (await outside.get(f"/static/{name}")).status_code == 200
    for name in ("../console_app.py", "%2e%2e/console_app.py", "..%2fconsole_app.py"):
        assert (await outside.get(f"/static/{name}")).status_code in (403, 404)


def test_a_console_that_nobody_could_enter_does_not_start(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="CONSOLE__PROXY: is not set, nor CONSOLE__USERS"):
        create_console(settings)


@pytest.mark.parametrize(
    ("console", "said"),
    [
        ({"proxy": "127.0.0.1"}, "SECRET has to have 32 characters"),
        ({"proxy": "127.0.0.1", "secret": "x" * 31}, "SECRET has to have 32 characters"),
        ({"proxy": "proxy.example", "secret": "x" * 32}, "does not appear to be an IPv4 or IPv6 network"),
        ({"users": [{"name": "a", "scrypt": "plain", "roles": ["viewer"]}]}, "scrypt"),
        ({"users": [{"name": "a", "scrypt": "0" * 32 + ":" + "0" * 64, "roles": []}]}, "roles"),
        ({"trace_url": "https://jaeger.example/"}, "trace_url"),
        ({"viewer_url": "http://nothing"}, "viewer_url"),
    ],
)
def test_settings_that_would_let_somebody_in_are_refused(console: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        ConsoleSettings.model_validate(console)
