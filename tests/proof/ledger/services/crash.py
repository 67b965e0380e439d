"""Places where a process stands still for good, so that the test can kill it there."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

__all__ = ["arm", "here", "reached"]


def arm(folder: Path, place: str) -> None:
    """Let the next run that comes to `place` stand still."""
    (folder / f"{place}.armed").touch()


def reached(folder: Path, place: str) -> bool:
    """Whether a run stands there."""
    return (folder / f"{place}.reached").exists()


async def here(place: str) -> None:
    """In the process: stand still, if this place is armed and nobody has been here before."""
    folder = Path(os.environ["CRASHES"])
    try:
        (folder / f"{place}.armed").rename(folder / f"{place}.reached")
    except FileNotFoundError:
        return
    await asyncio.sleep(3600)
