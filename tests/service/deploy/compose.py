"""`compose.yaml`, as Docker reads it."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML

from service.dev.places import ROOT

__all__ = ["COMPOSE", "parsed", "whole"]

COMPOSE = (ROOT / "compose.yaml").read_text()


def whole() -> dict[str, dict[str, Any]]:
    """All of it, with what its parts take over from each other."""
    found: dict[str, dict[str, Any]] = YAML(typ="safe", pure=True).load(COMPOSE)
    return found


def parsed() -> dict[str, dict[str, Any]]:
    """The services."""
    return whole()["services"]
