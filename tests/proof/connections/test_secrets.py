"""A password shows nowhere when a server cannot be reached, wherever in the URL it stands."""

from __future__ import annotations

import io

import alembic.command
import pytest
from alembic.config import Config
from alembic.util import CommandError

from relay.cli.app import main
from service.dev.places import ROOT
from service.settings import load_settings

_URLS = ["postgresql://u:s3cr3t@127.0.0.1:1/db", "postgresql://127.0.0.1:1/db?user=u&password=s3cr3t",
         "postgresql://u:s3cr3t/x@127.0.0.1:1/db"]  # fmt: skip


@pytest.fixture(params=_URLS)
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostgreSQL and a broker that are not there."""
    monkeypatch.setenv("DATABASE__URL", request.param)
    monkeypatch.setenv("BROKER__URL", "redis://:s3cr3t@127.0.0.1:1/0")


@pytest.mark.usefixtures("nowhere")
def test_alembic() -> None:
    configuration = Config(str(ROOT / "alembic.ini"))
    configuration.stdout = io.StringIO()
    with pytest.raises(CommandError) as refused:
        alembic.command.current(configuration)
    assert "cannot use 127.0.0.1:1/db: " in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


def test_alembic_sends_no_control_characters_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE__URL", "postgresql://u@127.0.0.1:1/db%1b[31m")
    monkeypatch.setenv("BROKER__URL", "redis://127.0.0.1:1/0")
    configuration = Config(str(ROOT / "alembic.ini"))
    configuration.stdout = io.StringIO()
    with pytest.raises(CommandError) as refused:
        alembic.command.current(configuration)
    assert r"cannot use 127.0.0.1:1/db\x1b[31m: " in str(refused.value)


@pytest.mark.usefixtures("nowhere")
def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["dead-letters", "list"])
    written = capsys.readouterr()
    assert ended.value.code == 3
    assert "127.0.0.1:1/db" in written.err
    assert "s3cr3t" not in written.out + written.err


@pytest.mark.usefixtures("nowhere")
def test_settings_that_are_printed() -> None:
    settings = load_settings()
    assert "s3cr3t" not in f"{settings!r} {settings} {settings.model_dump_json()} {settings.database.address!r}"
