"""A wrong setting names its variable, says what it should look like, and never shows its value."""

from __future__ import annotations

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
