"""What `docs/console.md` says is so."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import TYPE_CHECKING, get_args

from dotenv import dotenv_values

from service.console.rendering import NAVIGATION
from service.settings import ConsoleRole, ConsoleSettings, load_settings
from tests.service.docs.pages import DOCS, blocks

if TYPE_CHECKING:
    import pytest

PAGE = DOCS / "console.md"


def test_its_settings_are_taken(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks(PAGE, language="ini")
    for name, value in {**environment, **dotenv_values(stream=io.StringIO(block.text))}.items():
        monkeypatch.setenv(name, value or "")
    console = load_settings().console
    assert console.proxy == "10.0.0.7"
    assert console.groups["on-call"] == {"operator", "payload"}


def test_it_names_every_page_and_role() -> None:
    text = PAGE.read_text()
    assert [f"| {name} |" for _, name in NAVIGATION if f"| {name} |" not in text] == []
    assert [role for role in get_args(ConsoleRole) if f"| `{role}` |" not in text] == []
    assert ConsoleSettings().host in text


def test_the_command_makes_a_user_whom_the_settings_take() -> None:
    [command] = re.findall(r"`python -m (service.console user .*?)`", PAGE.read_text())
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=True)
    user = done.stdout.splitlines()[-1].strip()
    settings = ConsoleSettings.model_validate_json(f'{{"users": [{user}]}}')
    assert settings.users[0].roles == {"operator", "payload"}
