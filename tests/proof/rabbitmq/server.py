"""A private RabbitMQ: its own node, its own name server, its own cookie, on loopback only.

Nothing of it is shared with a RabbitMQ that the machine may run. What must stay true: whatever is started here is ended
by its process id.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from service.dev.places import ServerError
from service.dev.servers import Server, free_port, new_password

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

__all__ = ["Rabbitmq", "programs"]

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin:/opt/rabbitmq/sbin"


def programs() -> Path | None:
    """The folder of RabbitMQ's own scripts, or `None` where it is not installed.

    What Debian has on the PATH is a link to a wrapper beside them, which changes to an account and a folder of its own.
    """
    found = shutil.which("rabbitmq-server", path=_PATH)
    if found is None or shutil.which("epmd") is None:
        return None
    return Path(found).resolve().parent


class _NameServer(Server):
    """epmd, where the node is registered; in the foreground, so that it ends when we say."""

    name = "epmd"
    stop_signals = {"fast": signal.SIGTERM}  # noqa: RUF012

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.port = free_port()

    def _launch(self) -> subprocess.Popen[bytes]:
        command = ["epmd", "-port", str(self.port), "-address", "127.0.0.1"]
        return self._run(command, env={"PATH": _PATH}, cwd="/")  # it outlives the test that restarts a node

    def _ready(self) -> bool:
        return _answers(self.port, b"")


class Rabbitmq(Server):
    """RabbitMQ with its data in `data_dir`; the log stands beside it. `url` has the password of its only user."""

    name = "RabbitMQ"
    stop_signals = {"fast": signal.SIGTERM}  # noqa: RUF012

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        found = programs()
        assert found is not None, "RabbitMQ is not installed"
        self._programs = found
        self.port = free_port()
        self._node_port = free_port()
        self._node = f"outbox-{secrets.token_hex(6)}@localhost"
        self._password = new_password()
        self._names = _NameServer(data_dir.with_name(f"{data_dir.name}-epmd"))

    @property
    def url(self) -> str:
        """`amqp://` URL of the default virtual host."""
        return f"amqp://test:{self._password}@127.0.0.1:{self.port}/"

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl`, which takes a second or two; its output."""
        done = subprocess.run(
            [str(self._programs / "rabbitmqctl"), "--node", self._node, "--silent", *arguments],
            env=self._environment(),
            cwd=self.data_dir,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def fill_memory(self) -> None:
        """Raise the memory alarm: publishers are blocked until `free_memory()`."""
        self.control("set_vm_memory_high_watermark", "0.00001")

    def free_memory(self) -> None:
        """End the memory alarm."""
        self.control("set_vm_memory_high_watermark", "0.6")

    def start(self) -> Self:
        """Start it, again where the machine was so busy that its name server did not answer the node in time."""
        for _ in range(2):
            try:
                return super().start()
            except ServerError as error:
                if "nodistribution" not in str(error):
                    raise
        return super().start()

    def stop(self, mode: str | None = None) -> None:
        super().stop(mode)
        self._names.stop()

    def kill(self) -> None:
        super().kill()
        self._names.stop()

    def _environment(self) -> Mapping[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.data_dir),  # the cookie
            "ERL_EPMD_PORT": str(self._names.port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "RABBITMQ_MNESIA_BASE": str(self.data_dir / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.data_dir / "log"),
            "RABBITMQ_PID_FILE": str(self.data_dir / "pid"),
            "RABBITMQ_CONFIG_FILE": str(self.data_dir / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.data_dir / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.data_dir / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 2:2",
            "RABBITMQ_CTL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        }

    def _launch(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        configuration = self.data_dir / "rabbitmq.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            "default_user = test\n"
            f"default_pass = {self._password}\n"
            "vm_memory_high_watermark.relative = 0.6\n"
            "disk_free_limit.absolute = 1MB\n"
            "log.console = true\nlog.console.level = warning\nlog.file = false\n"
        )
        (self.data_dir / "rabbitmq-env.conf").write_text("")
        (self.data_dir / "enabled_plugins").write_text("[].\n")
        self._names.start()
        return self._run([str(self._programs / "rabbitmq-server")], env=self._environment(), cwd=self.data_dir)

    def _ready(self) -> bool:
        # A header of a version that it does not know is answered with one of its own.
        return _answers(self.port, b"AMQP\x00\x00\x00\x00")


def _answers(port: int, request: bytes) -> bool:
    with socket.socket() as client:
        client.settimeout(2)
        try:
            client.connect(("127.0.0.1", port))
            client.sendall(request)
            return not request or client.recv(8).startswith(b"AMQP")
        except OSError:
            return False
