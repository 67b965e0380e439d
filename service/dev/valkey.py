"""An embedded Valkey: a data directory, a server process, a URL."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

from service.dev.places import valkey_binary
from service.dev.servers import Server, free_port, new_password

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path


class Valkey(Server):
    """Valkey in `data_dir`, reached by a Unix socket that only this account can open.

    Args:
        data_dir: Its data; the log stands beside it.
        persistent: Keep an append-only file, so that a restart forgets nothing that is older than a second.
        settings: Further settings, such as `{"maxmemory": "8mb"}`.
        tcp: Listen on a free loopback port with a password instead of on a socket.
    """

    name = "Valkey"
    stop_signals = {"fast": signal.SIGTERM}  # noqa: RUF012

    def __init__(
        self, data_dir: Path, *, persistent: bool = False, settings: dict[str, str] | None = None, tcp: bool = False
    ) -> None:
        super().__init__(data_dir)
        self.persistent = persistent
        self.settings = settings or {}
        self.port = free_port() if tcp else None
        self._password = new_password() if tcp else None

    @property
    def url(self) -> str:
        """`unix://` or, with TCP, `redis://` URL of database 0."""
        if self.port is not None:
            return f"redis://:{self._password}@127.0.0.1:{self.port}/0"
        return f"unix://{self._socket()}"

    def log_tail(self) -> str:
        lines = self._last_lines()
        if any("FATAL CONFIG FILE ERROR" in line for line in lines):
            return ": ".join(lines[-2:]).removeprefix(">>> ")  # the setting, and what is wrong with it
        return super().log_tail()

    def _socket(self) -> Path:
        return self._socket_folder("valkey.sock") / "valkey.sock"

    def _launch(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = {
            "dir": str(self.data_dir),
            "daemonize": "no",
            "port": "0",
            "save": "",
            "appendonly": "yes" if self.persistent else "no",
            "maxmemory-policy": "noeviction",
            "shutdown-on-sigterm": "default" if self.persistent else "nosave",
        }
        if self.port is not None:
            options |= {"bind": "127.0.0.1", "port": str(self.port), "requirepass": str(self._password)}
        else:
            self._socket().unlink(missing_ok=True)
            options |= {"unixsocket": str(self._socket()), "unixsocketperm": "700"}
        # A file and not arguments: everybody on the machine can read a process's arguments.
        configuration = self.data_dir / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(f'{key} "{value}"\n' for key, value in (options | self.settings).items()))
        return self._run([str(valkey_binary()), str(configuration)], cwd=self.data_dir)

    def _ready(self) -> bool:
        family, address = (
            (socket.AF_INET, ("127.0.0.1", self.port))
            if self.port is not None
            else (socket.AF_UNIX, str(self._socket()))
        )
        with socket.socket(family) as client:
            client.settimeout(1)
            try:
                client.connect(address)
                client.sendall((f"AUTH {self._password}\r\n" if self._password else "").encode() + b"PING\r\n")
                return b"+PONG" in client.recv(256)
            except OSError:
                return False
