"""The OpenAPI document tells the truth: Schemathesis, with its default checks and stateful links, finds nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import APIRouter, Response
from fastapi.sse import EventSourceResponse

from service.api import create_app
from service.dev.issuer import every_scope
from service.dev.places import ROOT
from service.dev.stack import api_command
from service.http.openapi import ID, created
from tests.servers.real_servers import outside_environment
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator

    from service.dev.issuer import DevIssuer
    from service.settings import Settings

LISTENING = re.compile(r"running on (http://[0-9.:]+)")


@pytest.fixture
def api(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of an API process."""
    command = api_command(0)
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr)
    try:
        listening = until_sync(lambda: LISTENING.search(log.read_text()), what="the API")
        assert listening is not None
        yield listening[1]
    finally:
        process.kill()
        process.wait()


def test_the_document_is_true(api: str, tmp_path: Path, issuer: DevIssuer) -> None:
    document = httpx.get(f"{api}/openapi.json", trust_env=False).text
    if '"securitySchemes"' in document:  # without a domain nothing asks who is calling
        token = issuer.token("ada", every_scope())
        (tmp_path / "schemathesis.toml").write_text(f'[auth.openapi.bearer]\nbearer = "{token}"\n')
    script = str(Path(sys.executable).with_name("schemathesis"))
    command = [script, "--no-color", "run", f"{api}/openapi.json", "--seed", "1", "--max-examples", "30"]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.service.api.schemathesis_hooks", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, "--wait-for-schema", "10"],
        cwd=tmp_path,
        env=outside_environment() | hooks,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # Without a domain no operation links to another one.
    linked = '"links"' in document
    for phase in ("Coverage", "Fuzzing", *(["Stateful"] if linked else [])):
        assert re.search(rf"✅ +{phase}", run.stdout), run.stdout


def _operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


kinds = APIRouter(prefix="/kinds")


@kinds.delete("/nothing", status_code=204)
async def _nothing() -> None: ...


@kinds.get("/file", response_class=Response, responses={200: {"content": {"application/pdf": {}}}})
async def _file() -> None: ...


@kinds.get("/stream", response_class=EventSourceResponse)
async def _stream() -> None: ...


def test_every_operation_documents_its_problems(settings: Settings) -> None:
    """Whatever it answers when all is well."""
    app = create_app(settings)
    app.include_router(kinds)
    document = app.openapi()
    for name, operation in _operations(document):
        expected = {"500", "503", "504"}
        if "requestBody" in operation:
            expected |= {"400", "413", "415", "422"}
        if "parameters" in operation:
            expected |= {"422"}
        if "security" in operation:
            expected |= {"401", "403"}
        assert expected <= set(operation["responses"]), name
        for status, response in operation["responses"].items():
            if status >= "400":
                assert set(response["content"]) == {"application/problem+json"}, f"{name} {status}"


def test_a_route_added_later_is_documented_too(settings: Settings) -> None:
    app = create_app(settings)
    app.openapi()
    app.add_api_route("/later", lambda: None)
    assert "503" in app.openapi()["paths"]["/later"]["get"]["responses"]


made = APIRouter(prefix="/made")


@made.post("", status_code=201, responses=created(order=("get_order", {"wanted": [ID]})))
async def _make() -> None: ...


@made.get("/{made_id}")
async def _get_made(made_id: int) -> None: ...


@made.get("/{made_id}/parts")
async def _get_parts(made_id: int) -> None: ...


def test_what_was_made_leads_to_where_it_is(settings: Settings) -> None:
    app = create_app(settings)
    app.include_router(made)
    paths = app.openapi()["paths"]
    response = paths["/made"]["post"]["responses"]["201"]
    assert set(response["headers"]) == {"Location"}
    assert response["links"] == {
        "order": {"operationId": "get_order", "requestBody": {"wanted": [ID]}},
        "get": {"operationId": paths["/made/{made_id}"]["get"]["operationId"], "parameters": {"made_id": ID}},
    }
