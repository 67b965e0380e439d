"""Cleans up after this process if it dies without a chance to do so itself.

A guard is a shell that waits for a line on a pipe whose other end only we hold. The line means "all is well"; the end
of the file means that we are gone, and the guard does what we no longer can. A signal at the parent's death
(PR_SET_PDEATHSIG) would need code between fork and exec, which is unsafe with threads, and exists on Linux only.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from pathlib import Path

_KILL = 'read -r _ && exit; kill -s "$1" "$2"'
# The servers that write into the folder are being ended by guards of their own at the same time.
_REMOVE = 'read -r _ && exit; for _ in 1 2 3 4 5 6 7 8 9 10; do sleep 0.5; rm -rf "$1"; [ -e "$1" ] || exit; done'


class Guard:
    """One thing to do if this process dies; `dismiss()` it once that is no longer wanted."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", script, "guard", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PATH": os.defpath},  # whoever looks for our children by what they inherited does not find a guard
            start_new_session=True,
        )

    @classmethod
    def ending(cls, pid: int, signal: str = "TERM") -> Self:
        return cls(_KILL, signal, f"{pid}")

    @classmethod
    def removing(cls, folder: Path) -> Self:
        return cls(_REMOVE, str(folder))

    def dismiss(self) -> None:
        """Do nothing any more. Repeating it is harmless."""
        pipe = self._shell.stdin
        if pipe is not None and not pipe.closed:
            with suppress(BrokenPipeError):
                pipe.write(b"\n")
                pipe.flush()
            with suppress(BrokenPipeError):
                pipe.close()
        self._shell.wait()
