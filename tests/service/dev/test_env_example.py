"""`.env.example` names every setting with its default."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dotenv import dotenv_values

from service.dev.env_example import example
from service.dev.places import ROOT
from service.settings import OutboxSettings, Settings, SmtpSettings

if TYPE_CHECKING:
    from pathlib import Path


def test_the_example_is_up_to_date() -> None:
    advice = "run: .venv/bin/python -m service.dev.env_example > .env.example"
    assert (ROOT / ".env.example").read_text() == example(), advice


def test_as_it_stands_it_sets_nothing() -> None:
    assert dotenv_values(ROOT / ".env.example") == {}


def test_uncommented_it_sets_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^#(?=[A-Z])", "", example(), flags=re.MULTILINE))
    settings = Settings(_env_file=file)
    assert settings.outbox == OutboxSettings()
    assert settings.smtp == SmtpSettings()
    assert settings.database.url.get_secret_value() == "postgresql://user:password@localhost:5432/service"
