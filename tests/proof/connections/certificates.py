"""Certificates of a private CA, made by `openssl` for one test run."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Certificates"]

_NAMES = {"right": "IP:127.0.0.1,IP:192.0.2.1,DNS:localhost", "other-host": "DNS:other.example"}


@dataclass(frozen=True)
class Certificates:
    """`right`: of the CA, for 127.0.0.1 and 192.0.2.1. `other-host`: of the CA too. `self-signed`: of nobody."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's own, which a client is to trust."""
        return self.folder / "ca.crt"

    def server(self, name: str) -> ssl.SSLContext:
        """For a server that shows this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        return context

    def make(self) -> None:
        """Make the CA and the three certificates."""
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed: the tests of TLS need it to make certificates")
        authority = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
        self._openssl("ca", "/CN=Tests", *authority)
        for name, subjects in _NAMES.items():
            self._openssl(
                name, f"/CN={name}", "-addext", f"subjectAltName={subjects}", "-CA", "ca.crt", "-CAkey", "ca.key"
            )
        self._openssl("self-signed", "/CN=self", "-addext", f"subjectAltName={_NAMES['right']}")

    def _openssl(self, name: str, subject: str, *arguments: str) -> None:
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", subject]
        command += ["-keyout", f"{name}.key", "-out", f"{name}.crt", *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
