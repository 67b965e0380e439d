"""A wrong setting names its variable, says what it should look like, and never shows its value."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from service.errors import ConfigurationError
from service.settings import load_settings


@pytest.fixture(autouse=True)
def right_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no default."""
    monkeypatch.setenv("DATABASE__URL", "postgresql://user@host/service")
    monkeypatch.setenv("BROKER__URL", "redis://host")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE__URL", "postgresql://user:hidden@host:port/service"),
        ("DATABASE__URL", "postgresql://user:hidden@one:5432,two:port/service"),
        ("DATABASE__URL", "postgresql://user:hidden@one,/service"),
        ("DATABASE__URL", "postgresql://user:hidden@one,two"),
        ("SMTP__URL", "http://user:hidden@mail"),
        ("SMTP__URL", "smtp://user:hidden@mail:port"),
        ("SMTP__URL", "smtp://user:hidden@"),
        ("SMTP__URL", "smtp://user:hidden@[mail:25"),
        ("SMTP__SENDER", "hidden"),
        ("SMTP__SENDER", "hidden <a@example.com>"),
        ("SMTP__TIMEOUT", "-1"),
        ("API__MAX_BODY_BYTES", "0"),
        ("API__REQUEST_TIMEOUT", "hidden"),
        ("API__KEEP_IDEMPOTENCY_KEYS", "0"),
    ],
)
def test_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    load_settings()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert str(refused.value).startswith(f"{variable}: ")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["smtp://mail", "smtp+starttls://u:p@mail:587", "smtps://u:p%40@mail", "smtp://[::1]:25"]
)
def test_a_right_mail_server(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SMTP__URL", url)
    settings = load_settings()
    assert settings.smtp.url.get_secret_value() == url
    assert "p%40" not in repr(settings)


@pytest.mark.parametrize(
    ("given", "hosts", "ports", "wants"),
    [
        ("one:1,two:2/service", ["one", "two"], [1, 2], "read-write"),
        ("one,two:2/service?target_session_attrs=any", ["one", "two"], [5432, 2], "any"),
        ("[::1]:1,[::2]:2/service", ["::1", "::2"], [1, 2], "read-write"),
    ],
)
def test_several_database_hosts(
    monkeypatch: pytest.MonkeyPatch, given: str, hosts: list[str], ports: list[int], wants: str
) -> None:
    """As libpq takes them; SQLAlchemy and asyncpg read the same of it."""
    monkeypatch.setenv("DATABASE__URL", f"postgresql://user:a%40/b,@{given}")
    database = load_settings().database
    (_, taken) = database.sqlalchemy_url.get_dialect()().create_connect_args(database.sqlalchemy_url)
    assert taken == {
        "host": hosts,
        "port": ports,
        "user": "user",
        "password": "a@/b,",
        "database": "service",
        "target_session_attrs": wants,
    }
    query = parse_qs(urlsplit(database.dsn).query)
    assert query == {"host": [",".join(hosts)], "port": [",".join(map(str, ports))], "target_session_attrs": [wants]}
