"""With `ENVIRONMENT=production` nothing starts with what is not safe there, unless somebody says that it is meant."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT
from service.dev.stack import api_command
from service.errors import ConfigurationError
from service.production import NAMES, check_production, risks
from service.settings import load_settings
from tests.servers.real_servers import outside_environment

if TYPE_CHECKING:
    from service.production import Part

_SAFE = {
    "ENVIRONMENT": "production",
    "DATABASE__URL": "postgresql://app:c0ffee@db/service?sslmode=verify-full",
    "BROKER__URL": "rediss://:c0ffee@broker",
    "SMTP__URL": "smtps://app:c0ffee@mail",
    "API__HOSTS": "api.example.com",
    "API__RATE_LIMIT": "600",
    "FORWARDED_ALLOW_IPS": "",
}


@pytest.fixture(autouse=True)
def safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in order."""
    for name, value in _SAFE.items():
        monkeypatch.setenv(name, value)


def test_what_is_safe_starts() -> None:
    assert risks(load_settings()) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE__URL", "postgresql://app:c0ffee@localhost/service"),
        ("DATABASE__URL", "postgresql://app@/service?host=/run/postgresql"),
        ("DATABASE__URL", "postgresql://app@127.0.0.1,[::1]/service"),
        ("BROKER__URL", "redis://127.0.0.1"),
        ("BROKER__URL", "unix:///run/valkey"),
        ("BROKER__URL", "amqps://app:c0ffee@broker"),
        ("SMTP__URL", "smtp://localhost:25"),
        ("SMTP__URL", "smtp://app:c0ffee@mail:587"),  # it insists on STARTTLS
        ("API__HOSTS", "*"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/8"),
        ("API__CORS_ORIGINS", "https://shop.example.com"),
    ],
)
def test_this_is_safe_too(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert risks(load_settings()) == []


_PARTS: tuple[Part, ...] = ("api", "worker", "relay", "console")
_EVERY: set[Part] = {*_PARTS}
_CONSOLE: set[Part] = {"console"}
_SCRYPT = f"{'0' * 32}:{'0' * 64}"


def _proxied(**settings: str) -> str:
    return json.dumps({"proxy": "10.0.0.7", "secret": "s" * 32} | settings)


_REFUSED: list[tuple[str, str, str, set[Part]]] = [
    ("DATABASE__URL", "postgresql://app:postgres@db/service?sslmode=verify-full", "password-database", _EVERY),
    ("DATABASE__URL", "postgresql://app:app@localhost/service", "password-database", _EVERY),
    ("DATABASE__URL", "postgresql://app@db/service?sslmode=verify-full", "password-database", _EVERY),
    ("DATABASE__URL", "postgresql://app:c0ffee@db/service", "tls-database", _EVERY),
    ("DATABASE__URL", "postgresql://app:c0ffee@localhost,db/service?sslmode=prefer", "tls-database", _EVERY),
    ("BROKER__URL", "rediss://broker", "password-broker", {"worker", "relay"}),
    ("BROKER__URL", "amqp://guest:guest@localhost", "password-broker", {"worker", "relay"}),
    ("BROKER__URL", "redis://:c0ffee@broker", "tls-broker", {"worker", "relay"}),
    ("SMTP__URL", "smtp://mail:25", "tls-smtp", {"api", "worker"}),
    ("SMTP__URL", "smtps://app:changeme@mail", "password-smtp", {"api", "worker"}),
    ("API__HOSTS", "", "hosts", {"api"}),
    ("API__CORS_ORIGINS", "*", "cors", {"api"}),
    ("FORWARDED_ALLOW_IPS", "*", "proxy", {"api"}),
    ("CONSOLE__USERS", f'[{{"name": "ada", "scrypt": "{_SCRYPT}", "roles": ["viewer"]}}]', "console-users", _CONSOLE),
    ("CONSOLE", _proxied(proxy="10.0.0.7, ::/0"), "console-proxy", _CONSOLE),
    ("CONSOLE", _proxied(viewer_url="postgresql://v:c0ffee@db/service"), "tls-database", _CONSOLE),
]  # fmt: skip


@pytest.mark.parametrize(("variable", "value", "name", "parts"), _REFUSED)
def test_this_is_refused_by_whom_it_concerns(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str, parts: set[Part]
) -> None:
    monkeypatch.setenv(variable, value)
    settings = load_settings()
    for part in _PARTS:
        if part in parts:
            with pytest.raises(ConfigurationError, match=rf"\({name}\)") as refused:
                check_production(settings, part)
            assert "c0ffee" not in str(refused.value)
        else:
            check_production(settings, part)
    monkeypatch.setenv("ACCEPT_RISKS", f"{name}, cors")
    for part in _PARTS:
        check_production(load_settings(), part)
    monkeypatch.setenv("ENVIRONMENT", "development")
    assert risks(load_settings()) == []


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("DATABASE__URL", "postgresql://app:c0ffee@db/service?sslmode=require", "tls-database"),
        ("BROKER__URL", "rediss://:c0ffee@broker/?ssl_cert_reqs=none", "tls-broker"),
        ("IDENTITY__OFF", "true", "callers"),
        ("API__DOCS", "on", "docs"),
        ("API__RATE_LIMIT", "0", "rate-limit"),
        ("FORWARDED_ALLOW_IPS", None, "proxy"),
    ],
)
def test_this_is_only_warned_of(monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, name: str) -> None:
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    settings = load_settings()
    [risk] = risks(settings)
    assert (risk.name, risk.refused) == (name, False)
    check_production(settings, "api")


def test_a_risk_that_there_is_not_cannot_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCEPT_RISKS", "tls")
    with pytest.raises(ConfigurationError, match="ACCEPT_RISKS: tls: known are password-database"):
        risks(load_settings())


_PROCESSES = {
    "api": api_command(0),
    "worker": [sys.executable, "-m", "dramatiq", "service.worker:setup_broker", "-p", "1"],
    "relay": [sys.executable, "-m", "relay", "relay"],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", _PROCESSES)
def test_each_process_refuses_in_one_line(part: str) -> None:
    unsafe = {"DATABASE__URL": "postgresql://app:hidden@db/service", "ENV_FILE": "", "PYTHONPATH": str(ROOT)}
    given = outside_environment() | _SAFE | unsafe
    ended = subprocess.run(_PROCESSES[part], cwd=ROOT, env=given, capture_output=True, text=True, timeout=120)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if "(tls-database)" in line]
    assert len(said) == 1, ended.stderr
    assert "hidden" not in ended.stderr


def test_the_doctor_says_the_same(environment: dict[str, str]) -> None:
    """Problems are what a relay refuses; what the others refuse is advice, for it knows only its own settings."""
    given = environment | {
        "ENVIRONMENT": "production", "API__CORS_ORIGINS": "*", "SMTP__URL": "smtps://app:app@mail",
        "ACCEPT_RISKS": "password-smtp,rate-limit,proxy",
    }  # fmt: skip
    command = [sys.executable, "-m", "relay", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    found = {
        each["seen"]: each["level"] for each in json.loads(done.stdout)["findings"] if each["check"] == "production"
    }
    assert found == {
        "the mail server's password is well known, which ACCEPT_RISKS says is meant": "ok",
        "any Host header is taken (hosts): does not start: api": "advice",
        "pages of any site may read answers (cors): does not start: api": "advice",
        "a proxy on another host would pass for every client, which ACCEPT_RISKS says is meant": "ok",
        "one client may send any number of requests, which ACCEPT_RISKS says is meant": "ok",
    }


def test_the_page_lists_every_risk() -> None:
    page = (ROOT / "docs" / "production.md").read_text()
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
