"""The hooks of `.pre-commit-config.yaml` are what `make lint` runs: neither is forgotten when the other one changes."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from ruamel.yaml import YAML

from service.dev.places import ROOT

HOOKS = ROOT / ".pre-commit-config.yaml"

# What a hook mends, and what it is told about files, is its own affair.
_OF_HOOKS = {"--fix", "--force-exclude"}
_OF_LINT = {"--check"}


def _hooks() -> set[tuple[str, ...]]:
    [repository] = YAML(typ="safe", pure=True).load(HOOKS.read_text())["repos"]
    assert repository["repo"] == "local", "a hook from elsewhere is not pinned by our locks"
    return {tuple(word for word in hook["entry"].split() if word not in _OF_HOOKS) for hook in repository["hooks"]}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(not HOOKS.exists(), reason="this project has no hooks")
def test_the_hooks_run_what_make_lint_runs() -> None:
    listed = subprocess.run(
        ["make", "-n", "--no-print-directory", "lint", "STAMP=stamp", "--old-file=stamp"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lint = {
        tuple(word for word in line.split() if word not in _OF_LINT and not word.endswith((".yaml", ".yml")))
        for line in listed.stdout.splitlines()
    }
    assert _hooks() == lint
