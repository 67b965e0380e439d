"""Settings that a domain adds: read under a prefix of their own, and checked when a process starts."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent
from typing import TYPE_CHECKING

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

import service.domains
from service.dev.env_example import example
from service.dev.places import ROOT
from service.errors import ConfigurationError
from service.settings import DomainSettings, load
from tests.servers.real_servers import outside_environment

if TYPE_CHECKING:
    from pathlib import Path

_SETTINGS = """\
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict
from service.settings import DomainSettings

class BillingSettings(DomainSettings):
    '''Where invoices are made.'''

    model_config = SettingsConfigDict(env_prefix="{prefix}")

    key: SecretStr = Field(description="Key of the account")
    days: int = Field(30, ge=1, description="Days until an invoice is due")
    banks: list[str] = Field(["one"], description="Banks")
"""

_PROCESSES = {
    "api": "import service.api; service.api.create_app()",
    "worker": "import service.worker; service.worker.setup_broker()",
}


class BillingSettings(DomainSettings):
    model_config = SettingsConfigDict(env_prefix="BILLING__")

    key: SecretStr
    days: int = Field(30, ge=1)
    banks: tuple[str, ...] = ()


@pytest.fixture
def domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose packages are domains too."""
    monkeypatch.setattr(service.domains, "__path__", [*service.domains.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def _add(folder: Path, name: str, prefix: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    (folder / name / "settings.py").write_text(_SETTINGS.format(prefix=prefix))


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENV_FILE", str(tmp_path / "other.env"))
    (tmp_path / "other.env").write_text("KEY=wrong\nBILLING__KEY=file\nBILLING__DAYS=7\nDATABASE__URL=no\n")
    monkeypatch.setenv("BILLING__DAYS", "8")
    monkeypatch.setenv("BILLING__BANKS", '["one", "two"]')
    found = load(BillingSettings)
    assert (found.key.get_secret_value(), found.days, found.banks) == ("file", 8, ("one", "two"))


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "BILLING__KEY: is not set (see .env.example)"),
        (
            {"KEY": "hidden", "BILLING__DAYS": "hidden"},
            "BILLING__KEY: is not set; BILLING__DAYS: Input should be a valid",
        ),
        ({"BILLING__KEY": "k", "BILLING__DAYS": "0"}, "BILLING__DAYS: Input should be greater than or equal to 1"),
        ({"BILLING__KEY": "k", "BILLING__BANKS": "hidden"}, "BILLING__BANKS: expected JSON"),
    ],
)
def test_what_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as refused:
        load(BillingSettings)
    assert str(refused.value).startswith(says)
    assert "hidden" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("process", _PROCESSES)
def test_a_wrong_one_ends_the_process_at_its_start_with_one_line(tmp_path: Path, process: str) -> None:
    _add(tmp_path, "billing", "BILLING__")
    urls = {"DATABASE__URL": "postgresql://user@host/service", "BROKER__URL": "redis://host", "IDENTITY__OFF": "true"}
    start = f"import service.domains; service.domains.__path__.append({str(tmp_path)!r}); {_PROCESSES[process]}"
    for variables, says in (({}, "KEY: is not set"), ({"BILLING__KEY": "k", "BILLING__DAYS": "-7"}, "DAYS: Input")):
        environment = outside_environment() | urls | variables | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(
            [sys.executable, "-c", start], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert ended.returncode == 2
        [line] = ended.stderr.strip().splitlines()
        assert line.startswith(f"{process}: BILLING__{says}")
        assert "-7" not in line


def test_the_example_file_has_them_without_reading_them(domains: Path) -> None:
    _add(domains, "billing", "billing__")
    assert (
        dedent("""
        # Where invoices are made.

        # Key of the account (required)
        #BILLING__KEY=
        # Days until an invoice is due
        #BILLING__DAYS=30
        # Banks
        #BILLING__BANKS=["one"]
    """)
        in example()
    )


@pytest.mark.parametrize("prefix", ["", "BILLING_", "outbox__", "SHOP__"])
def test_a_prefix_that_others_have_is_refused(domains: Path, prefix: str) -> None:
    _add(domains, "archive", "SHOP__")
    assert len(service.domains.settings()) == 1
    _add(domains, "billing", prefix)
    with pytest.raises(ConfigurationError, match=r"^service.domains.billing.settings.BillingSettings needs"):
        service.domains.settings()
