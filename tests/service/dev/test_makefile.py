"""The Makefile's bootstrap: its help, and one line of advice where Python does not suffice."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from service.dev.places import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The files of a fresh clone that the bootstrap reads."""
    for name in ("Makefile", "pyproject.toml", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def _python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_make_alone_lists_the_targets_and_installs_nothing(fresh: Path) -> None:
    done = _make(fresh)
    assert done.returncode == 0
    for target in ("demo", "chaos", "bench"):
        assert f"make {target} " not in done.stdout, "it goes with its folder"
    for target in ("test", "dev", "reset", "lint", "fmt", "lock", "migration", "downgrade"):
        assert f"make {target} " in done.stdout
    assert not (fresh / ".venv").exists()


def test_too_old_a_python_is_one_line_of_advice(fresh: Path) -> None:
    done = _make(fresh, "test", _python(fresh, "exit 1"))
    assert done.returncode != 0
    assert "no Python 3.11 or newer" in done.stderr.splitlines()[0]
    assert not (fresh / ".venv").exists()


def test_a_python_without_venv_is_one_line_of_advice(fresh: Path) -> None:
    done = _make(fresh, "test", _python(fresh, 'case "$2" in *ensurepip*) exit 1;; esac'))
    assert done.returncode != 0
    assert "apt install python3-venv" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(("edited", "packages"), [("pyproject.toml", False), ("requirements-dev.lock", True)])
def test_only_a_changed_lock_installs_the_packages_again(fresh: Path, edited: str, packages: bool) -> None:
    for age, name in enumerate((edited, "stamp", "stamp-packages", "pyproject.toml", "requirements-dev.lock")):
        if age == 0 or name != edited:
            (fresh / name).touch()
            os.utime(fresh / name, (10**9 - age, 10**9 - age))
    done = _make(fresh, "-n", "install", "STAMP=stamp")
    assert "--no-build-isolation -e ." in done.stdout
    assert ("--require-hashes" in done.stdout) == packages


@pytest.mark.parametrize("target", ["lock", "upgrade"])
def test_only_upgrade_moves_versions(fresh: Path, target: str) -> None:
    done = _make(fresh, "-n", target)
    assert done.stdout.count("uv pip compile") == 2
    assert done.stdout.count("--upgrade") == (2 if target == "upgrade" else 0)


def test_what_the_benchmark_compares_with_is_locked_where_there_is_one(fresh: Path) -> None:
    peers = fresh / "tests" / "proof" / "bench" / "requirements.in"
    peers.parent.mkdir(parents=True)
    peers.touch()
    assert _make(fresh, "-n", "lock").stdout.count("uv pip compile") == 3
