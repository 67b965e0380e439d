"""The operators' console of `make dev`, with a user of the clone's own. It works without the console's folder, too."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COMMAND = [sys.executable, "-m", "service.console"]
PORT = "CONSOLE__PORT"

_USER = "dev"
_SET = ("CONSOLE__USERS", "CONSOLE__PROXY")


def has_console() -> bool:
    """Whether the console is still here."""
    found = importlib.util.find_spec("service.console")
    return found is not None and found.origin is not None


def variables(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Settings of a console that lets the user in whose password is kept in the folder; none if others are set."""
    if not has_console() or any(environment.get(name) for name in _SET):
        return {}
    kept = _kept(folder)
    return {"CONSOLE__USERS": json.dumps([kept["user"]]), "CONSOLE__SECRET": kept["secret"]}


def says(folder: Path, environment: Mapping[str, str]) -> str:
    """Where it is, and how to come in."""
    kept = _kept(folder)
    ours = environment.get("CONSOLE__USERS") == json.dumps([kept["user"]])
    how = f"   (log in as {_USER} with {kept['password']})" if ours else ""
    return f"http://127.0.0.1:{environment[PORT]}{how}"


def _kept(folder: Path) -> dict[str, str]:
    file = folder / "console.json"
    if not file.exists():
        made = subprocess.run(
            [*COMMAND, "user", _USER, "operator", "payload"], capture_output=True, text=True, check=True
        )
        lines = [line.strip() for line in made.stdout.splitlines()]
        kept = {"password": lines[1], "user": json.loads(lines[3]), "secret": secrets.token_hex(32)}
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as new:
            new.write(json.dumps(kept))
    found: dict[str, str] = json.loads(file.read_text())
    return found
