"""A wrong setting names its variable, says what it should look like, and never shows its value."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args  # type: ignore[attr-defined]

from service.api import create_app
from service.errors import ConfigurationError
from service.network.postgres_url import read_postgres
from service.network.urls import without_secrets
from service.settings import load_settings


@pytest.fixture(autouse=True)
def right_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no default."""
    monkeypatch.setenv("DATABASE__URL", "postgresql://user@host/service")
    monkeypatch.setenv("BROKER__URL", "redis://host")
    monkeypatch.setenv("IDENTITY__OFF", "true")


def test_the_documentation_has_the_title_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API__TITLE", "My shop")
    assert create_app(load_settings()).openapi()["info"]["title"] == "My shop"


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
    ("variable", "value", "says"),
    [
        ("DATABASE__URL", "postgresql://user:hidden@host/service?ssl=require", "the parameter ssl is not known"),
        ("DATABASE__URL", "postgresql://user:hidden@host/service?channel_binding=x", "known are host, port, user"),
        ("DATABASE__URL", "postgresql://user:x?hidden@host", "names no database"),
        ("DATABASE__URL", "postgresql://user:x@hidden@host/service", "percent-encoded"),
        ("DATABASE__URL", "postgresql://host/service?password=hidden&sslmode=on", "sslmode: expected one of disable"),
        ("DATABASE__URL", "postgresql://host/service?sslrootcert=/hidden", "sslrootcert: expected a readable file"),
        ("DATABASE__URL", "postgresql://host/service?sslcert=/hidden&sslkey=/hidden", "sslcert, sslkey: expected"),
        ("DATABASE__URL", "postgresql://host/service?sslkey=/hidden", "there is no sslcert"),
        ("DATABASE__URL", "postgresql://host/service?connect_timeout=0", "connect_timeout: expected whole seconds"),
        ("DATABASE__URL", "postgresql://one/service?target_session_attrs=read-only", "because the service writes"),
        ("DATABASE__URL", "postgresql://one/service?host=two", "twice"),
        ("DATABASE__URL", "postgresql:///service?host=one,two&port=1,2,3", "host1:5432,host2:5432"),
        ("DATABASE__URL", "mysql://user:hidden@host/service", "expected postgresql://"),
        ("BROKER__URL", "redis://:hidden/word@host:6379/0", "percent-encoded"),
        ("BROKER__URL", "redis://user:12/hidden@host", "the database is no number"),
        ("BROKER__URL", "redis://user:12?hidden@host", "something after the ? is not known"),
        ("BROKER__URL", "redis://:12#hidden@host", "percent-encoded"),
        ("BROKER__URL", "amqp://user:hidden/word@host:5672/", "percent-encoded"),
        ("BROKER__URL", "amqp://user:12/hidden@host:5672/", "one virtual host"),
        ("BROKER__URL", "amqp://host/one/two", "one virtual host"),
        ("BROKER__URL", "amqp://hidden@host/", "both user and password"),
        ("BROKER__URL", "amqps://host/?cafile=/hidden", "the parameter cafile is not known here; known are heartbeat"),
        ("BROKER__URL", "redis://one:hidden@a,b", "several hosts"),
        ("BROKER__URL", "redis://a:1,b:2/0", "several hosts"),
        ("BROKER__URL", "amqp://u:hidden@a:1;amqp://u:hidden@b:1", "several hosts"),
        ("BROKER__URL", "redis+sentinel://hidden@host", "expected redis://"),
        ("BROKER__URL", "redis://host/?decode_responses=true", "the parameter decode_responses is not known"),
        ("BROKER__URL", "rediss://host/?ssl_cert_reqs=hidden", "expected required or none"),
        ("BROKER__TLS_CA_FILE", "/hidden", "expected a readable file"),
        ("BROKER__SILENCE_TIMEOUT", "0", "greater than or equal to 2"),
        ("SMTP__URL", "smtp://u:hidden/x@mail:25", "percent-encoded"),
        ("SMTP__URL", "smtp://u:12/hidden@mail", "percent-encoded"),
        ("SMTP__TLS_CA_FILE", "/hidden", "expected a readable file"),
    ],
)
def test_what_not_all_processes_would_read_alike(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings()
    assert str(refused.value).startswith(f"{variable}: ")
    assert says in str(refused.value)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "valkeys://user:p%2Fw@host:6380/3?ssl_cert_reqs=none",
        "unix:///run/valkey.sock?db=1",
        "unix://:p%3Bw@/run/valkey.sock",
        "amqp://host",
        "amqps://user:p%3Bw@host:5671/%2F?heartbeat=30",
        "amqp://user:p;w,@[::1]:5672/shop",
    ],
)
def test_a_right_broker(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("BROKER__URL", url)
    assert load_settings().broker.url.get_secret_value() == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkeys://user:p%2Fw@host:6380/3?password=p@w", "valkeys://host:6380/3"),
        ("unix://:p%3Bw@/run/valkey.sock", "unix:///run/valkey.sock"),
        ("amqp://user:p;w,@[::1]:5672/shop", "amqp://[::1]:5672/shop"),
        ("smtp+starttls://user:pw@mail:587", "smtp+starttls://mail:587"),
    ],
)
def test_an_address_to_show(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


_PLAIN = {"user": "user", "password": "a@/b,"}


@pytest.mark.parametrize(
    ("given", "hosts", "parameters"),
    [
        ("one/service", [("one", 5432)], {}),
        ("/service?host=/run/pg&port=5433", [("/run/pg", 5433)], {}),
        ("/service", [(None, None)], {}),
        ("%2Frun%2Fpg:5433/service", [("/run/pg", 5433)], {}),
        ("one:1,two:2/service", [("one", 1), ("two", 2)], {"target_session_attrs": "read-write"}),
        ("one,two:2/service?target_session_attrs=any", [("one", 5432), ("two", 2)], {"target_session_attrs": "any"}),
        ("/service?host=one,two&port=7", [("one", 7), ("two", 7)], {"target_session_attrs": "read-write"}),
        ("[::1]:1,[::2]:2/service", [("::1", 1), ("::2", 2)], {"target_session_attrs": "read-write"}),
        ("/service?host=::1,::2&port=1,2", [("::1", 1), ("::2", 2)], {"target_session_attrs": "read-write"}),
        (
            "one/service?sslmode=require&options=-c%20a%3Db+c",
            [("one", 5432)],
            {"sslmode": "require", "options": "-c a=b+c"},
        ),
    ],
)
def test_a_right_database(
    monkeypatch: pytest.MonkeyPatch,
    given: str,
    hosts: list[tuple[str | None, int | None]],
    parameters: dict[str, str],
) -> None:
    """As libpq reads it, and again from the URL that is made of it."""
    monkeypatch.setenv("DATABASE__URL", f"postgresql://user:a%40/b,@{given}")
    settings = load_settings()
    for url in (settings.database.url.get_secret_value(), settings.database.dsn):
        address = read_postgres(url)
        assert (list(address.hosts), address.database) == (hosts, "service")
        assert address.parameters == _PLAIN | parameters
        assert "a@" not in address.where + repr(address) + repr(settings)


def test_the_driver_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://u:a%40+%2B@[::1]:1,two/s%2Fx?options=-c%20a%3Db")
    arguments: dict[str, Any] = dict.fromkeys(inspect.signature(_parse_connect_dsn_and_args).parameters)
    addresses, taken = _parse_connect_dsn_and_args(**arguments | {"dsn": load_settings().database.dsn})
    assert addresses == [("::1", 1), ("two", 5432)]
    assert (taken.user, taken.password, taken.database) == ("u", "a@++", "s/x")
    assert (taken.server_settings, taken.target_session_attrs) == ({"options": "-c a=b"}, "read-write")


def test_a_timeout_in_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://host/service?connect_timeout=3&application_name=shop")
    database = load_settings().database
    assert (database.connect_timeout, database.address.application_name) == (3, "shop")
