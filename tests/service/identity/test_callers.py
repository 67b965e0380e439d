"""Machines with keys, gateways that are believed, and routes that forgot to ask."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import APIRouter, FastAPI
from pydantic import ValidationError

from service.api import create_app
from service.dev.places import ROOT
from service.errors import ConfigurationError
from service.http.callers import PUBLIC, check_callers
from service.identity import needs
from service.identity.api_keys import digest, new_api_key
from service.identity.principal import install_identity
from service.settings import IdentitySettings
from tests.servers.real_servers import outside_environment
from tests.service.api.problems import assert_problem

if TYPE_CHECKING:
    from pathlib import Path

    from service.settings import Settings
    from tests.service.identity.conftest import Serve


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_machine_has_a_key(serve_with: Serve) -> None:
    old, new, other = new_api_key(), new_api_key(), new_api_key()
    entry: dict[str, Any] = {"name": "billing", "scopes": ["things:write"]}
    keys = [entry | {"sha256": digest(old)}, entry | {"sha256": digest(new)}, {"name": "ads", "sha256": digest(other)}]
    async with serve_with(api_keys=keys) as client:
        for key in (old, new):  # both, while one takes over from the other
            assert (await client.get("/me", headers=_bearer(key))).json() == ["key:billing", "things:write"]
            assert (await client.post("/things", headers=_bearer(key))).status_code == 201
        assert (await client.get("/me", headers=_bearer(other))).json() == ["key:ads"]
        assert_problem(await client.post("/things", headers=_bearer(other)), 403, "missing_scope")
        for unknown in (new_api_key(), digest(old), old[:-1], f"{old}x", old.upper()):
            assert_problem(await client.get("/me", headers=_bearer(unknown)), 401, "token_refused")


def test_a_key_is_made_once_and_only_its_hash_is_kept() -> None:
    command = [sys.executable, "-m", "service.identity", "billing", "things:write"]
    made = subprocess.run(command, cwd=ROOT, env=outside_environment(), capture_output=True, text=True, check=True)
    _, key, _, entry = made.stdout.splitlines()
    settings = IdentitySettings.model_validate({"api_keys": [json.loads(entry)]})
    assert settings.api_keys[0].sha256 == digest(key.strip())
    assert key.strip() not in entry


async def test_behind_a_gateway_nobody_is_refused_and_the_start_says_so(
    serve_with: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    async with serve_with(off=True) as client:
        assert "identity.off" in capsys.readouterr().out
        assert (await client.get("/me")).json() == ["everybody"]
        assert (await client.post("/things")).status_code == 201


async def test_a_gateway_may_say_who_is_calling(serve_with: Serve) -> None:
    async with serve_with(off=True, gateway_header="X-User") as client:
        assert (await client.get("/me", headers={"X-User": "ada"})).json() == ["gateway:ada"]
        for headers in ([], [("X-User", "")], [("X-User", "ada"), ("X-User", "bob")]):
            assert_problem(await client.get("/me", headers=headers), 401, "unauthenticated")


async def test_without_off_a_gateway_is_not_believed(serve_with: Serve) -> None:
    async with serve_with(api_keys=[{"name": "billing", "sha256": "0" * 64}]) as client:
        assert_problem(await client.get("/me", headers={"X-User": "ada"}), 401, "unauthenticated")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"issuer": "https://id.example"}, "together"),
        ({"audience": "me"}, "together"),
        ({"issuer": "http://id.example", "audience": "me"}, "this machine alone"),
        ({"issuer": "any", "audience": "me", "keys_url": "http://id.example/keys"}, "this machine alone"),
        ({"issuer": "any", "audience": "me", "keys_url": "ftp://id.example/keys"}, "expected https"),
        ({"keys_url": "https://id.example/keys"}, "of no use"),
        ({"off": True, "issuer": "https://id.example", "audience": "me"}, "OFF"),
        ({"gateway_header": "X-User"}, "OFF"),
        ({"api_keys": [{"name": "billing", "sha256": "secret"}]}, "sha256"),
    ],
)
def test_settings_that_do_not_hang_together(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        IdentitySettings.model_validate(wrong)


def test_routes_that_ask_need_somebody_who_can_answer() -> None:
    app = FastAPI()
    install_identity(app, IdentitySettings())
    app.add_api_route("/asks", lambda: None, dependencies=[needs()])
    with pytest.raises(ConfigurationError, match="IDENTITY__ISSUER: is not set"):
        install_identity(app, IdentitySettings())


_DOMAIN = """
from fastapi import APIRouter
from service.identity import needs
router = APIRouter()
router.add_api_route("/domains", lambda: None, dependencies={})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dependencies", "says"),
    [("[needs()]", "IDENTITY__ISSUER: is not set"), ("[]", "nothing says who may call GET /domains")],
)
def test_the_process_does_not_start_and_says_why_in_one_line(tmp_path: Path, dependencies: str, says: str) -> None:
    (tmp_path / "asking").mkdir()
    (tmp_path / "asking" / "__init__.py").touch()
    (tmp_path / "asking" / "routes.py").write_text(_DOMAIN.format(dependencies))
    only = f"import service.domains; service.domains.__path__[:] = [{str(tmp_path)!r}]"
    urls = {"DATABASE__URL": "postgresql://user@host/service", "BROKER__URL": "redis://host", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", f"{only}; import service.api; service.api.create_app()"],
        cwd=tmp_path,
        env=outside_environment() | urls,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"api: {says}")


def test_a_route_that_says_nothing_is_not_served(settings: Settings) -> None:
    app, router = FastAPI(), APIRouter(prefix="/some")
    router.add_api_route("/thing", lambda: None, methods=["POST"])
    app.include_router(router)
    with pytest.raises(ConfigurationError, match="nothing says who may call POST /some/thing"):
        check_callers(app)
    for said in ([PUBLIC], [needs("things:write")]):
        app = FastAPI()
        app.include_router(router, dependencies=said)
        check_callers(app)


async def test_nor_is_one_that_was_added_later(settings: Settings) -> None:
    app = create_app(settings)
    app.add_api_route("/later", lambda: None)
    with pytest.raises(ConfigurationError, match="GET /later"):
        async with app.router.lifespan_context(app):
            pass
