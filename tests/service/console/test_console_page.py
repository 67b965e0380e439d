"""What `docs/console.md` says is so."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, get_args

from dotenv import dotenv_values
from ruamel.yaml import YAML

from service.console.rendering import NAVIGATION
from service.dev.places import ROOT
from service.settings import ConsoleRole, ConsoleSettings, load_settings
from tests.service.docs.pages import DOCS, blocks

if TYPE_CHECKING:
    from pathlib import Path

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


def test_what_takes_it_out_leaves_all_other_services_as_they_are(tmp_path: Path) -> None:
    [block] = blocks(PAGE, language="sh")
    removes, cuts = block.text.splitlines()
    assert [path for path in removes.split()[3:] if not (ROOT / path).exists()] == []
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    before = YAML(typ="safe").load(ROOT / "compose.yaml")
    subprocess.run(["sh", "-ec", cuts], cwd=tmp_path, check=True)
    text = (tmp_path / "compose.yaml").read_text()
    after = YAML(typ="safe").load(text)
    assert "service.console" in str(before["services"].pop("console"))
    assert after == before
    assert "docs/console.md" not in text


def test_the_command_makes_a_user_whom_the_settings_take() -> None:
    [command] = re.findall(r"`python -m (service.console user .*?)`", PAGE.read_text())
    done = subprocess.run([sys.executable, "-m", *command.split()], capture_output=True, text=True, check=True)
    user = done.stdout.splitlines()[-1].strip()
    settings = ConsoleSettings.model_validate_json(f'{{"users": [{user}]}}')
    assert settings.users[0].roles == {"operator", "payload"}
