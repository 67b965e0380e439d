"""What is secret can be read from files: a whole URL, or a password that stands apart from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from pydantic_settings import SettingsConfigDict

from service.errors import ConfigurationError
from service.settings import DomainSettings, load, load_settings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder, and what else is needed."""
    monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("DATABASE__URL", "postgresql://user@one,two:5433/service")
    monkeypatch.setenv("BROKER__URL", "redis://host:6379/0")
    return tmp_path


def test_a_password_from_a_file_gets_into_its_url(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "database__password").write_text("p@ss/ :?#\n")
    (secrets / "BROKER__PASSWORD").write_text("x,y;z")
    (secrets / "smtp__password").write_text("é")
    (secrets / "kubernetes.io").mkdir()
    (secrets / "kubernetes.io" / "token").write_text("of somebody else")
    monkeypatch.setenv("SMTP__URL", "smtps://user@[::1]:465")
    settings = load_settings()
    assert settings.database.address.parameters["password"] == "p@ss/ :?#"
    assert settings.database.address.where == "one:5432,two:5433/service"
    assert settings.broker.url.get_secret_value() == "redis://:x%2Cy%3Bz@host:6379/0"
    assert settings.smtp.url.get_secret_value() == "smtps://user:%C3%A9@[::1]:465"
    assert "p@ss" not in repr(settings)


def test_a_whole_url_can_be_a_secret_and_the_environment_wins(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "broker__url").write_text("amqp://user:password@host:5672/")
    assert load_settings().broker.url.get_secret_value().startswith("redis:")
    monkeypatch.delenv("BROKER__URL")
    assert load_settings().broker.is_rabbitmq


def test_a_domain_s_settings_too(secrets: Path) -> None:
    class CouponSettings(DomainSettings):
        model_config = SettingsConfigDict(env_prefix="COUPONS_")
        key: str

    (secrets / "coupons_key").write_text("one")
    assert load(CouponSettings).key == "one"


def test_two_passwords_are_refused(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (secrets / "database__password").write_text("one")
    monkeypatch.setenv("DATABASE__URL", "postgresql://user:hidden@host/service")
    with pytest.raises(ConfigurationError, match="DATABASE: the password stands in the URL and apart from it") as error:
        load_settings()
    assert "hidden" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRETS_DIR", str(secrets / "none"))
    with pytest.raises(ConfigurationError, match="SECRETS_DIR: there is no such folder"):
        load_settings()


def test_a_file_that_is_no_text_is_refused(secrets: Path) -> None:
    (secrets / "database__password").write_bytes(b"\xff\x00")
    with pytest.raises(ConfigurationError, match="SECRETS_DIR: a file in it cannot be read"):
        load_settings()
