"""The whole service on one machine: its servers, its migrations and its processes, as `make dev` and the demo use them.

`DATABASE__URL` and `BROKER__URL`, from the environment or `.env`, win over the embedded servers, each on its own.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotenv import dotenv_values

from service.dev.places import ROOT, ServerError, clone_data
from service.dev.postgres import Postgres
from service.dev.valkey import Valkey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DATABASE = "service"
"""Name of the database in an embedded server."""

URLS = ("DATABASE__URL", "BROKER__URL")

_DEMO = "service.dev.demo"


def configured() -> dict[str, str]:
    """What the developer set: `.env`, and over it the environment. An empty value counts as not set."""
    values = {key: value for key, value in dotenv_values(ROOT / ".env").items() if value}
    return values | {key: value for key, value in os.environ.items() if value or key not in URLS}


@contextmanager
def embedded_servers(environment: Mapping[str, str], folder: Path, *, lasting: bool) -> Iterator[dict[str, str]]:
    """Start a server for each URL that `environment` lacks, and give the environment with both."""
    given = dict(environment)
    with ExitStack() as stack:
        if "DATABASE__URL" not in given:
            postgres = stack.enter_context(Postgres(folder / "postgres"))
            given["DATABASE__URL"] = postgres.ensure_database(DATABASE)
        if "BROKER__URL" not in given:
            given["BROKER__URL"] = stack.enter_context(Valkey(folder / "valkey", persistent=lasting)).url
        yield given


@contextmanager
def clone_lock() -> Iterator[bool]:
    """Whether this process has the clone's data for itself; `False` while `make dev` runs."""
    with (clone_data() / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            with suppress(FileNotFoundError):
                _running_file().unlink()


@contextmanager
def clone_servers() -> Iterator[dict[str, str]]:
    """The environment of `make dev`: that of the one that runs, else with servers started for as long as this takes."""
    environment = configured()
    with clone_lock() as ours:
        if not ours:
            yield environment | running_environment()
            return
        with embedded_servers(environment, clone_data(), lasting=True) as given:
            yield given


def _running_file() -> Path:
    return clone_data() / "running.json"


def note_running(variables: Mapping[str, str]) -> None:
    """Tell other commands where the running servers are; the file may hold a password."""
    file = _running_file()
    file.touch(mode=0o600)
    file.write_text(json.dumps(dict(variables)))


def running_environment() -> dict[str, str]:
    """The variables that the running `make dev` has noted."""
    try:
        noted: dict[str, str] = json.loads(_running_file().read_text())
    except (FileNotFoundError, ValueError):
        raise ServerError("`make dev` is still starting or just ending; try again in a moment") from None
    return noted


def run_alembic(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Alembic in a process of its own."""
    command = [sys.executable, "-m", "alembic", *arguments]
    return subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True)


def migrate(environment: Mapping[str, str]) -> None:
    """Bring the database up to date.

    Raises:
        ServerError: with one line that says what to do.
    """
    done = run_alembic(environment, "upgrade", "heads")
    if done.returncode == 0:
        return
    if unknown := re.search(r"Can't locate revision identified by '([^']+)'", done.stdout + done.stderr):
        raise ServerError(
            f"the database has migration {unknown[1]}, which this checkout no longer has: it was made by other code. "
            "Run `make reset` for an empty one (for a database of your own: point DATABASE__URL to a new one)"
        )
    raise ServerError(f"migrating failed: {_last_line(done)}")


def undo(environment: Mapping[str, str]) -> None:
    """Take the latest migration of `domains` back.

    Raises:
        ServerError: with one line that says why not.
    """
    done = run_alembic(environment, "downgrade", "domains@-1")
    if done.returncode != 0:
        raise ServerError(f"nothing was undone: {_last_line(done)}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {done.returncode}"


def has_example() -> bool:
    """Whether the example domain and the demo of it are still here."""
    found = [importlib.util.find_spec(name) for name in ("service.domains.orders", _DEMO)]
    # What `git rm` leaves behind of a package, its byte code, is a namespace without an origin.
    return all(spec is not None and spec.origin is not None for spec in found)


def example() -> Any:
    """The demo of the example domain, by name: this package works without it, and passes the type checker too."""
    return importlib.import_module(_DEMO)


def _program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def api_command(port: int) -> list[str]:
    """The HTTP API on a loopback port."""
    application = ("service.api:create_app", "--factory", "--http", "service.http.protocol:BoundedProtocol")
    return _program("uvicorn", *application, "--host", "127.0.0.1", "--port", str(port))


def relay_command() -> list[str]:
    return [*outbox_command(), "relay"]


def outbox_command() -> list[str]:
    """The `outbox` CLI of this virtual environment."""
    return [str(Path(sys.executable).with_name("outbox"))]


def worker_command(*, processes: int, threads: int) -> list[str]:
    """Dramatiq's own CLI with the service's broker."""
    return _program("dramatiq", "service.worker:setup_broker", "-p", str(processes), "-t", str(threads))


def sink_command(port: int, file: Path, reject_file: Path, delay: float = 0) -> list[str]:
    options: dict[str, Any] = {"--port": port, "--file": file, "--reject-file": reject_file, "--delay": delay}
    return _program("service.dev.sink", *(str(part) for option in options.items() for part in option))
