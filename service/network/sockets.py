"""What all connections to servers have in common: how soon silence is noticed, and whom TLS trusts.

TCP waits a quarter of an hour for an answer to what was sent, and for ever where nothing is sent. A server that was
unplugged, a firewall that forgot and an address that moved are noticed only by who asks for it.
"""

from __future__ import annotations

import socket
import ssl

_PROBES = 3


def silence_options(seconds: int) -> dict[str, int]:
    """Options at `IPPROTO_TCP` that end a connection after `seconds` without a sign of its other end.

    Keepalive notices it while the connection is idle, the user timeout while something that was sent is unconfirmed.

    Returns:
        By the names that the `socket` module has for them, as far as this platform has them.
    """
    interval = max(seconds // 5, 1)
    idle = max(seconds - _PROBES * interval, 1)
    wanted = {
        "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": idle,  # the latter is macOS's name
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": seconds * 1000,
    }
    return {name: value for name, value in wanted.items() if hasattr(socket, name)}


def notice_silence(sock: socket.socket, seconds: int) -> None:
    """Set the options on a connected socket. One that is not TCP's has no other host that could vanish."""
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in silence_options(seconds).items():
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tls_context(ca_file: str) -> ssl.SSLContext:
    """A context that verifies certificate and name, and trusts `ca_file`, unless empty, beside the system's."""
    context = ssl.create_default_context()
    if ca_file:
        context.load_verify_locations(ca_file)
    return context


def check_ca_file(path: str) -> str:
    """The path itself.

    Raises:
        ValueError: when there is no certificate in the file.
    """
    if path:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except (OSError, ValueError):
            raise ValueError("expected a readable file with one or more certificates in PEM") from None
    return path
