"""A service that was there before takes over the ledger, as `docs/existing-service.md` says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from service.dev.places import ROOT
from service.dev.postgres import psql
from tests.service.docs.pages import EXISTING_SERVICE, blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.real_servers import Where

pytestmark = pytest.mark.slow

_EXISTING = Path(__file__).parent / "existing"


class Existing:
    """The service that was there before, on a database of its own."""

    def __init__(self, folder: Path, environment: dict[str, str], url: str) -> None:
        self.folder = folder
        shutil.copytree(_EXISTING, folder)
        for file in folder.rglob("*.txt"):  # so called to keep this project's type checker out of them
            file.rename(file.with_suffix(""))
        shutil.copy(ROOT / "migrations" / "script.py.mako", folder / "migrations")
        self._environment = environment | {
            "DATABASE__URL": url,
            "SHOP_DATABASE": url.replace("postgresql://", "postgresql+asyncpg://"),
            "TEMPLATE": str(ROOT),
            "PYTHONPATH": str(folder),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self._environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def edit(self, name: str, old: str, new: str) -> None:
        file = self.folder / name
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))


@pytest.fixture
def existing(server_folder: Path, servers: Where, environment: dict[str, str]) -> Iterator[Existing]:
    name = f"existing_{uuid4().hex[:12]}"
    psql(servers.postgres, f'CREATE DATABASE "{name}"')
    yield Existing(server_folder / "existing", environment, servers.postgres.replace("/postgres?", f"/{name}?"))
    psql(servers.postgres, f'DROP DATABASE "{name}" WITH (FORCE)')


def test_the_ledger_moves_into_an_existing_service(existing: Existing) -> None:
    existing.run("alembic", "upgrade", "head")
    [configuration] = blocks(EXISTING_SERVICE, language="ini")
    [metadata] = [
        block for block in blocks(EXISTING_SERVICE, language="python") if block.title == "in migrations/env.py"
    ]
    copy, upgrade = blocks(EXISTING_SERVICE, language="bash")
    existing.run("sh", "-eu", "-c", copy.text)
    [deletable] = re.findall(r"you can delete: ([^.]+\.py`.*?)\.\n", EXISTING_SERVICE.read_text(), re.DOTALL)
    for name in re.findall(r"`([\w/]+\.py)`", deletable):
        (existing.folder / name).unlink()
    existing.edit(
        "alembic.ini", "script_location = migrations\n", f"script_location = migrations\n{configuration.text}"
    )
    existing.edit("migrations/env.py", "target_metadata = Base.metadata\n", metadata.text)
    existing.run("sh", "-eu", "-c", upgrade.text)
    existing.run("alembic", "revision", "--autogenerate", "-m", "more", "--head", "0001@head")
    [revision] = (existing.folder / "migrations" / "versions").glob("*_more.py")
    assert "op." not in revision.read_text()
    for block in blocks(EXISTING_SERVICE, language="python"):
        if block.title.startswith("file "):
            file = existing.folder / block.title.removeprefix("file ")
            file.parent.mkdir(exist_ok=True)
            file.parent.joinpath("__init__.py").touch()
            file.write_text(block.text)
    assert existing.run(sys.executable, "first_event.py").split() == ["customers.greet", "True"]
