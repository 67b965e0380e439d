"""Who is calling the console, and what they may do: by the word of a proxy, or by a session of a local user.

What must stay true: whoever is not known for certain is nobody. A proxy is believed if the connection comes from its
address and the request has the secret, both, because either alone is had by others too: by whatever else runs on the
proxy's host, and by whoever reads its configuration. A session is a signed cookie, so nothing is kept of it here.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Protocol

from service.errors import ConfigurationError
from service.settings import listed

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from starlette.requests import HTTPConnection

    from service.settings import ConsoleRole, ConsoleSettings, ConsoleUser

COOKIE = "console_session"
SECRET_HEADER = "X-Console-Secret"  # noqa: S105  the header's name

_NAME = re.compile(r"[ -~]{1,255}")
_ROLES: tuple[ConsoleRole, ...] = ("viewer", "payload", "operator")


@dataclass(frozen=True, slots=True)
class ConsoleCaller:
    """Somebody who may at least look.

    Attributes:
        name: What the record calls them.
        roles: What else they may.
        session: What the forms that they are given are bound to.
    """

    name: str
    roles: frozenset[ConsoleRole]
    session: str

    def may(self, role: ConsoleRole) -> bool:
        """Whoever may do anything may look."""
        return role in self.roles or (role == "viewer" and bool(self.roles))


class ConsoleIdentity(Protocol):
    """A way to tell callers apart; `logs_in` if it has a page for that."""

    logs_in: bool

    def caller(self, request: HTTPConnection) -> ConsoleCaller | None:
        """Who sent the request, or `None` for nobody that is known."""
        ...


class Signer:
    """Signs what is handed out, so that it is known again: sessions and forms."""

    def __init__(self, secret: str) -> None:
        self._key = hashlib.sha256(secret.encode()).digest() if secret else secrets.token_bytes(32)

    def sign(self, purpose: str, text: str) -> str:
        """A signature that is good for this purpose alone."""
        return hmac.new(self._key, f"{purpose}\n{text}".encode(), hashlib.sha256).hexdigest()

    def signed(self, purpose: str, text: str, signature: str) -> bool:
        return hmac.compare_digest(self.sign(purpose, text).encode(), signature.encode(errors="replace"))


class ByProxy:
    """Believes a proxy, which has asked who it is and refused whom it does not know."""

    logs_in = False

    def __init__(self, settings: ConsoleSettings) -> None:
        self._networks = [ip_network(each) for each in listed(settings.proxy)]
        self._secret = settings.secret.get_secret_value().encode()
        self._user_header, self._groups_header = settings.user_header, settings.groups_header
        self._groups: Mapping[str, Collection[ConsoleRole]] = settings.groups or {each: (each,) for each in _ROLES}

    def caller(self, request: HTTPConnection) -> ConsoleCaller | None:
        names = request.headers.getlist(self._user_header)
        if not self._is_proxy(request) or len(names) != 1 or not _NAME.fullmatch(names[0]):
            return None
        groups = listed(",".join(request.headers.getlist(self._groups_header)))
        roles = frozenset(role for group in groups for role in self._groups.get(group, ()))
        return ConsoleCaller(names[0], roles, f"proxy:{names[0]}") if roles else None

    def _is_proxy(self, request: HTTPConnection) -> bool:
        given = request.headers.getlist(SECRET_HEADER)
        if len(given) != 1 or not hmac.compare_digest(given[0].encode(), self._secret) or request.client is None:
            return False
        try:
            address = ip_address(request.client.host)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


class LocalUsers:
    """Knows users who log in with a password."""

    logs_in = True

    def __init__(self, users: Collection[ConsoleUser], lasts: float, signer: Signer) -> None:
        self._users = {each.name: each for each in users}
        self._lasts = lasts
        self._signer = signer

    def kept_of(self, name: str) -> str | None:
        """What is kept of their password."""
        user = self._users.get(name)
        return None if user is None else user.scrypt

    def new_session(self, name: str) -> str:
        """A cookie for somebody who has shown the right password. Another password ends it."""
        session = f"{name}:{int(time.time() + self._lasts)}:{secrets.token_hex(8)}"
        return f"{session}:{self._signer.sign('session', self._bound(session, name))}"

    def caller(self, request: HTTPConnection) -> ConsoleCaller | None:
        session, _, signature = request.cookies.get(COOKIE, "").rpartition(":")
        name, _, rest = session.partition(":")
        user = self._users.get(name)
        if user is None or not self._signer.signed("session", self._bound(session, name), signature):
            return None
        if int(rest.partition(":")[0]) <= time.time():
            return None
        return ConsoleCaller(name, user.roles, session)

    def _bound(self, session: str, name: str) -> str:
        return f"{session}\n{self.kept_of(name)}"


def identity_of(settings: ConsoleSettings, signer: Signer) -> ByProxy | LocalUsers:
    """The way that the settings name.

    Raises:
        ConfigurationError: they name none, so that nobody could come in.
    """
    if settings.proxy:
        return ByProxy(settings)
    if settings.users:
        return LocalUsers(settings.users, settings.session, signer)
    raise ConfigurationError(
        "CONSOLE__PROXY: is not set, nor CONSOLE__USERS, so that nobody could come in; for a user on your machine run: "
        "python -m service.console user NAME operator payload"
    )
