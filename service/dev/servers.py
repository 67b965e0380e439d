"""What the embedded servers have in common: one child process, started, stopped and killed by its process id.

Each runs in a session of its own, so that Ctrl-C reaches only us and we decide the order in which things stop, and
has a guard that ends it should we die first.
"""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from service.dev.guard import Guard
from service.dev.places import ServerError

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
_PORTS = range(29_000, 32_000)  # below Linux's and macOS's for outgoing connections
_given: deque[int] = deque(maxlen=len(_PORTS) // 2)
_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 104 to 108 bytes
_PLAIN_PATH = re.compile(r"[\w./+-]+", re.ASCII)  # a comma separates hosts in a URL, and clients differ over the rest


def free_port() -> int:
    """A loopback TCP port that nobody listens on just now, and that was not given to anybody else here lately.

    The kernel gives none of these to an outgoing connection, which could otherwise take it before the server does.
    """
    for port in secrets.SystemRandom().sample(_PORTS, len(_PORTS)):
        if port in _given:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _given.append(port)
            return port
    raise ServerError(f"no loopback port from {_PORTS[0]} to {_PORTS[-1]} is free")


def new_password() -> str:
    """A password for a server that listens on TCP, where other users of the machine can reach it."""
    return secrets.token_urlsafe(18)


def socket_folder(preferred: Path, socket_name: str) -> Path:
    """`preferred`, or a new temporary folder if a socket's path in it would be too long or awkward in a URL."""
    for parent in (preferred, Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108  mkdtemp makes a private folder
        longest = len(str(parent)) + len(socket_name) + 20
        if longest <= _LONGEST_SOCKET_PATH and _PLAIN_PATH.fullmatch(str(parent)):
            return parent if parent == preferred else Path(tempfile.mkdtemp(prefix="outbox-", dir=parent))
    raise ServerError(f"the path of the socket {preferred / socket_name} is too long; set TMPDIR to a shorter one")


class Server(ABC):
    """A server process, its log beside its data. A context manager that starts it on entry and stops it on exit."""

    name: str
    stop_signals: dict[str, signal.Signals]
    """How to stop, by the name that `stop()` takes; the first is the default."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self._sockets: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the process."""

    @abstractmethod
    def _ready(self) -> bool:
        """Whether it accepts connections."""

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def _socket_folder(self, name: str) -> Path:
        """Where its socket of this name is: among its data, or in a new folder that is gone once it is stopped."""
        if self._sockets is None:
            self._sockets = socket_folder(self.data_dir, name)
        return self._sockets

    def _run(self, command: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **how
            )

    def start(self) -> Self:
        """Start it and wait until it accepts connections.

        Raises:
            ServerError: with the last line of its log.
        """
        if self.pid is not None:
            return self
        self._forget()
        self._process = self._launch()
        self._guard = Guard.ending(self._process.pid, next(iter(self.stop_signals.values())).name.removeprefix("SIG"))
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._ready():
            if process.poll() is not None:
                raise ServerError(f"{self.name} did not start: {self.log_tail()} (log: {self.log})")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self.name} did not start in {START_TIMEOUT:.0f} s: {self.log_tail()} (log: {self.log})"
                )
            time.sleep(0.01)

    def stop(self, mode: str | None = None) -> None:
        """Stop it, by force if it takes too long."""
        self._end(mode)
        if self._sockets not in (None, self.data_dir):
            shutil.rmtree(self._sockets, ignore_errors=True)
        self._sockets = None

    def _end(self, mode: str | None) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(self.stop_signals[mode or next(iter(self.stop_signals))])
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        self._forget()

    def kill(self) -> None:
        """SIGKILL it and its children, as the kernel does when memory runs out."""
        process = self._process
        if process is not None and process.poll() is None:
            family = _family(process.pid)
            process.kill()
            for child in family:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
            _wait_for_end(family)
        self._forget()

    def restart(self, mode: str | None = None) -> None:
        """Stop and start it at the same address, with its data."""
        self._end(mode)
        self.start()

    def log_tail(self) -> str:
        """The most telling line at the end of its log."""
        lines = self._last_lines()
        telling = [line for line in lines if any(word in line for word in ("FATAL", "ERROR", "# ", "error"))]
        return (telling or lines or ["it wrote no log"])[-1]

    def _last_lines(self) -> list[str]:
        try:
            return [line.strip() for line in self.log.read_text(errors="replace").splitlines()[-20:] if line.strip()]
        except OSError:
            return []

    def _forget(self) -> None:
        if self._guard is not None:
            self._guard.dismiss()
        if self._process is not None:
            self._process.wait()
        self._guard = self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _wait_for_end(processes: list[psutil.Process]) -> None:
    """Wait until none runs any more; whether somebody has already collected their exit status does not matter."""
    deadline = time.monotonic() + STOP_TIMEOUT
    while time.monotonic() < deadline and any(_runs(process) for process in processes):
        time.sleep(0.005)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
