"""What `make dev` watches: whoever saves the code or `.env` sees it run a moment later.

Only what the service's processes read counts: `service/dev` is the code that watches, and runs on as it was started.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

_PERIOD = 1.0


class Watch:
    """Finds saved, new and removed files below `root` by their times; needs nothing of the file system beyond those."""

    def __init__(self, root: Path, period: float = _PERIOD) -> None:
        self._root = root
        self._period = period
        self._seen = self._scan()
        self._due = time.monotonic() + period

    def changed(self) -> list[str]:
        """What changed since the last look, relative to `root`; looks once in `period` seconds at most."""
        now = time.monotonic()
        if now < self._due:
            return []
        self._due = now + self._period
        before, self._seen = self._seen, self._scan()
        return sorted({str(path.relative_to(self._root)) for path, _ in before.items() ^ self._seen.items()})

    def _scan(self) -> dict[Path, tuple[int, int, int]]:
        found = {}
        for path in self._files():
            with suppress(OSError):  # removed meanwhile, or a broken link, as some editors make for a lock
                status = path.stat()
                found[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
        return found

    def _files(self) -> Iterator[Path]:
        yield self._root / ".env"
        for top in ("service", "relay"):
            for folder, folders, names in os.walk(self._root / top):
                here = Path(folder)
                folders[:] = [each for each in folders if here / each != self._root / "service" / "dev"]
                yield from (here / name for name in names if name.endswith(".py"))


def shown(changed: list[str]) -> str:
    """The changed files in a few words."""
    more = f" and {len(changed) - 1} more" if changed[1:] else ""
    return visible(changed[0]) + more
