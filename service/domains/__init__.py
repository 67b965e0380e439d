"""The business domains: one folder per feature, found here and nowhere else listed.

A domain is a sub-package with any of these modules: `models`, `events`, `consumers` (imported by the API, the worker
and Alembic alike, so that all agree on who consumes what), `routes` with an `APIRouter` named `router` (imported by
the API alone) and `settings` (checked by API and worker). To remove a domain, delete its folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, TypeGuard

from service.errors import ConfigurationError
from service.outbox.upcasting import check_upcasters
from service.settings import DomainSettings, Settings, load

if TYPE_CHECKING:
    from types import ModuleType

    from fastapi import APIRouter

__all__ = ["check_settings", "discover", "routers", "settings"]


def _names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def _modules(part: str) -> list[ModuleType]:
    names = [f"{__name__}.{domain}.{part}" for domain in _names()]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name) is not None]


def discover() -> None:
    """Import every domain's models, events and consumers.

    Raises:
        EventDefinitionError: an event has upcasters, and none from one of its earlier versions.
    """
    for part in ("models", "events", "consumers"):
        _modules(part)
    check_upcasters()


def routers() -> list[APIRouter]:
    """The router of every domain that has one, in the order of the domains' names."""
    return [module.router for module in _modules("routes")]


def settings() -> list[type[DomainSettings]]:
    """The settings that the domains add, unread.

    Raises:
        ConfigurationError: one has no prefix, or that of others.
    """
    found = [kind for module in _modules("settings") for kind in vars(module).values() if _is_made_in(module, kind)]
    taken = {f"{name}__".upper() for name in Settings.model_fields}
    for kind in found:
        prefix = kind.model_config.get("env_prefix", "").upper()
        if not prefix.endswith("__") or prefix in taken:
            name = f"{kind.__module__}.{kind.__name__}"
            raise ConfigurationError(f"{name} needs an env_prefix that no other settings have and that ends in __")
        taken.add(prefix)
    return found


def check_settings() -> None:
    """Read what the domains add, so that a wrong variable ends the process at its start and not a request later.

    Raises:
        ConfigurationError: a variable is missing or wrong.
    """
    for kind in settings():
        load(kind)


def _is_made_in(module: ModuleType, kind: object) -> TypeGuard[type[DomainSettings]]:
    return isinstance(kind, type) and issubclass(kind, DomainSettings) and kind.__module__ == module.__name__
