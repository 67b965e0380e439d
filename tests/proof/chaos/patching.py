"""Changes a module of the service the moment it is imported, or at once where it has been."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

__all__ = ["replace", "when_imported"]

_PATCHES: dict[str, list[Callable[[Any], None]]] = {}


def when_imported(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that is given the module `name` right after its code ran, or now if it has.

    Raises:
        SystemExit: when there is no such module, so that its patch would change nothing.
    """
    package, *rest = name.split(".")
    found = importlib.util.find_spec(package)  # a deeper one would be imported with all it needs
    if found is None or not Path(found.origin or "").parent.joinpath(*rest).with_suffix(".py").is_file():
        raise SystemExit(f"there is no module {name} to patch")

    def register(patch: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in sys.modules:
            patch(sys.modules[name])
        else:
            _PATCHES.setdefault(name, []).append(patch)
        return patch

    return register


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a module or class that has it.

    Raises:
        SystemExit: when it has none of this name, so that the patch would change nothing.
    """
    if not hasattr(owner, name):
        raise SystemExit(f"{owner.__name__} has no {name} to patch")
    setattr(owner, name, value)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for patch in _PATCHES[module.__name__]:
            patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


sys.meta_path.insert(0, _Finder())
