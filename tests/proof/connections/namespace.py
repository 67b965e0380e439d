"""A network of the test's own, in which packets can be lost without a word.

On the machine's own network the kernel answers for whoever has gone; only a packet filter makes silence, and a filter
there would be everybody's.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Namespace"]

_NEW_NETWORK = 0x40000000
_FILTER = (
    "add table ip lost; add set ip lost ports {type inet_service;}; "
    "add chain ip lost arrivals {type filter hook input priority 0;}; "
    "add rule ip lost arrivals tcp sport @ports drop; add rule ip lost arrivals tcp dport @ports drop"
)


class Namespace:
    """A network namespace with a loopback interface."""

    def __init__(self) -> None:
        self._name = f"outbox-test-{secrets.token_hex(4)}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread opens and starts in the block is in the namespace."""
        if not sys.platform.startswith("linux") or os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nft"))):
            pytest.skip(
                "silence needs root, iproute2 and nftables: `apt-get install iproute2 nftables`, and run as root"
            )
        self._run("ip", "netns", "add", self._name)
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(Path("/run/netns", self._name))
            self._run("ip", "link", "set", "lo", "up")
            self._run("nft", _FILTER)
            yield
        finally:
            _set_network(before)
            os.close(before)
            self._run("ip", "netns", "delete", self._name)

    def lose(self, ports: Iterable[int]) -> None:
        """Drop every packet from and to these ports from now on."""
        self._run("nft", f"add element ip lost ports {{{','.join(map(str, ports))}}}")

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _set_network(descriptor)
    finally:
        os.close(descriptor)


def _set_network(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.setns(descriptor, _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())
