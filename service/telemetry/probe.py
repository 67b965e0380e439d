"""Whether the relay or the workers of a container are alive: `python -m service.telemetry.probe` tells its supervisor.

Each process touches a file once a second, after its event loop has answered, and the probe looks how old the files are.
So it needs no port, answers with the metrics off, is reached by nobody else, and sees each process of a worker. The API
has HTTP, and probes of its own. What must stay true:

- A file counts only while its process holds a lock on it, which ends with the process: what a killed one left behind,
  in a volume that outlives the container, says nothing.
- An outage of PostgreSQL or of the broker is no reason to be restarted. Only `ready` tells of it.
- Nothing but the standard library is imported here: the probe starts every few seconds.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 10.0
"""Seconds for which an event loop may have answered nothing."""

FOLDER = "PROBE_FOLDER"
"""The environment variable that the processes have it by, as the setting `probe_folder`."""

_READY, _NOT_READY = b"1", b"0"


class SignOfLife:
    """This process's file.

    Args:
        folder: Made if it is not there.
        kind: What the process is, for whoever reads what the probe says.
    """

    def __init__(self, folder: str, kind: str) -> None:
        self._path = Path(folder, f"{kind}-{os.getpid()}")
        self._file: int | None = None

    def touch(self, *, ready: bool) -> None:
        """The process is alive, and connected or not.

        Raises:
            OSError: when the file cannot be written.
        """
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                os.lockf(file, os.F_TLOCK, 0)  # ends with the process, and a fork does not inherit it
            except OSError:
                os.close(file)
                raise
            self._file = file
        os.pwrite(self._file, _READY if ready else _NOT_READY, 0)

    def remove(self) -> None:
        """The process ends in good order."""
        if self._file is not None:
            with suppress(OSError):
                self._path.unlink()
            os.close(self._file)
            self._file = None


def look(folder: str, *, ready: bool) -> tuple[bool, str]:
    """Whether all processes that show themselves in the folder are alive, or `ready` as well; and what was seen."""
    seen: list[str] = []
    well = True
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            found = _process(entry.path)
            if found is None:
                continue
            age, is_ready = found
            if age > PATIENCE:
                well = False
                seen.append(f"{entry.name} has not answered for {age:.0f} s")
            elif ready and not is_ready:
                well = False
                seen.append(f"{entry.name} is not connected to PostgreSQL")
            else:
                seen.append(f"{entry.name} is well")
    return (well, ", ".join(sorted(seen))) if seen else (False, f"no process shows itself in {folder}")


def _process(path: str) -> tuple[float, bool] | None:
    """How old the sign of the process is that holds this file, in seconds, and whether it is ready; `None` if none."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # it has just ended
        return None
    try:
        os.lockf(file, os.F_TEST, 0)
    except OSError:  # it is locked
        return time.time() - os.fstat(file).st_mtime, os.read(file, 1) == _READY
    else:
        return None
    finally:
        os.close(file)


def _main(arguments: list[str]) -> int:
    if arguments not in ([], ["live"], ["ready"]):
        sys.stderr.write("usage: python -m service.telemetry.probe [live | ready]\n")
        return 2
    folder = os.environ.get(FOLDER, "")
    if not folder:
        sys.stderr.write(f"probe: {FOLDER} is not set\n")
        return 2
    well, seen = look(folder, ready=arguments == ["ready"])
    sys.stdout.write(f"{seen}\n")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
