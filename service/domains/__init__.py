"""The business domains: one folder per feature, found here and nowhere else listed.

A domain is a sub-package with any of these modules: `models`, `events`, `consumers` (imported by the API, the worker
and Alembic alike, so that all agree on who consumes what) and `routes` with an `APIRouter` named `router` (imported by
the API alone). To remove a domain, delete its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import APIRouter

__all__ = ["discover", "routers"]


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def discover() -> None:
    """Import every domain's models, events and consumers."""
    for domain in _names():
        for part in ("models", "events", "consumers"):
            name = f"{__name__}.{domain}.{part}"
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)


def routers() -> list[APIRouter]:
    """The router of every domain that has one, in the order of the domains' names."""
    found = []
    for domain in _names():
        name = f"{__name__}.{domain}.routes"
        if importlib.util.find_spec(name) is not None:
            found.append(importlib.import_module(name).router)
    return found
