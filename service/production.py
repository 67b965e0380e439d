"""What a service that is open to the world must not be started with: `ENVIRONMENT=production` asks for all of it.

Each thing that is wrong is a risk with a name. A process refuses to start for what lets others in or lets them read
along, and warns of what may be in order where it runs. Whoever means it says so: `ACCEPT_RISKS=tls-database,proxy`.
What must stay true: a process is refused only for what it uses itself, and no message repeats a password.
"""

from __future__ import annotations

import os
import sys
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from service.errors import ConfigurationError
from service.network.urls import is_local
from service.settings import listed
from service.telemetry.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from service.settings import DatabaseSettings, Settings

Part = Literal["api", "worker", "relay", "console"]

_log = get_logger(__name__)

NAMES = (
    "password-database", "password-broker", "password-smtp", "tls-database", "tls-broker", "tls-smtp",
    "hosts", "cors", "proxy", "callers", "docs", "rate-limit", "console-users", "console-proxy", "console-payloads",
)  # fmt: skip
"""Those that there are."""

_WELL_KNOWN = frozenset((
    "", "password", "passwd", "postgres", "postgresql", "guest", "admin", "root", "service", "secret", "changeme",
    "change-me", "example", "test", "redis", "valkey", "rabbitmq", "123456", "12345678",
))  # fmt: skip
_EVERYBODY: tuple[Part, ...] = ("api", "worker", "relay", "console")
_WITH_BROKER: tuple[Part, ...] = ("worker", "relay")
_WITH_MAIL: tuple[Part, ...] = ("api", "worker")
_RANDOM = "set a random one"
_ENCRYPTED = ("rediss", "valkeys", "amqps", "smtps", "smtp+starttls")


class Risk(NamedTuple):
    """Something that is wrong in production.

    Attributes:
        name: One of `NAMES`.
        refused: Whether a process that uses it refuses to start, rather than to warn.
        parts: The processes that use it.
        seen: What is wrong.
        cure: What to do about it.
        accepted: Whether `ACCEPT_RISKS` names it.
    """

    name: str
    refused: bool
    parts: tuple[Part, ...]
    seen: str
    cure: str
    accepted: bool = False


def check_production(settings: Settings, part: Part) -> None:
    """Warn of what is wrong, in production.

    Raises:
        ConfigurationError: naming what this process refuses to start with.
    """
    mine = [each for each in risks(settings) if part in each.parts and not each.accepted]
    for each in mine:
        if not each.refused:
            _log.warning("production.risk", risk=each.name, seen=each.seen, cure=each.cure)
    if refused := [f"{each.seen}: {each.cure} ({each.name})" for each in mine if each.refused]:
        raise ConfigurationError("; ".join(refused) + "; or name it in ACCEPT_RISKS (docs/production.md)")


def exit_if_unsafe(settings: Settings, part: Part) -> None:
    """As `check_production`, or end this process with status 2 and one line on stderr."""
    try:
        check_production(settings, part)
    except ConfigurationError as error:
        sys.stderr.write(f"{part}: {error}\n")
        raise SystemExit(2) from None


def risks(settings: Settings, environment: Mapping[str, str] = os.environ) -> list[Risk]:
    """What is wrong, if this is production.

    Args:
        settings: Those of the process.
        environment: Where Uvicorn finds which proxies it may believe.

    Raises:
        ConfigurationError: when `ACCEPT_RISKS` names what is no risk.
    """
    accepted = set(listed(settings.accept_risks))
    if unknown := accepted - set(NAMES):
        raise ConfigurationError(f"ACCEPT_RISKS: {', '.join(sorted(unknown))}: known are {', '.join(NAMES)}")
    if settings.environment != "production":
        return []
    found = (
        *_of_database(settings.database, _EVERYBODY),
        *_of_broker(settings),
        *_of_mail(settings),
        *_of_api(settings, environment),
        *_of_console(settings),
    )
    return [each._replace(accepted=each.name in accepted) for each in found]


def _of_database(database: DatabaseSettings, parts: tuple[Part, ...]) -> Iterator[Risk]:
    address = database.address
    given = address.parameters
    near = all(host is None or host.startswith("/") or is_local(host) for host, _ in address.hosts)
    if _is_known(given.get("user"), given.get("password", ""), needed=not near and "sslcert" not in given):
        yield Risk("password-database", True, parts, "PostgreSQL's password is none or well known", _RANDOM)
    mode, verify = given.get("sslmode", "prefer"), "sslmode=verify-full and sslrootcert in DATABASE__URL"
    if near or mode == "verify-full":
        return
    encrypted = mode in ("require", "verify-ca")
    seen = "nothing makes sure which PostgreSQL answers" if encrypted else "the way to PostgreSQL need not be encrypted"
    yield Risk("tls-database", not encrypted, parts, seen, verify)


def _of_broker(settings: Settings) -> Iterator[Risk]:
    url = urlsplit(settings.broker.url.get_secret_value())
    near = url.scheme == "unix" or is_local(url.hostname or "")
    if _is_known(url.username, url.password or "", needed=not near and "password=" not in url.query):
        yield Risk("password-broker", True, _WITH_BROKER, "the broker's password is none or well known", _RANDOM)
    if not near and url.scheme not in _ENCRYPTED:
        cure = "rediss://, valkeys:// or amqps:// in BROKER__URL"
        yield Risk("tls-broker", True, _WITH_BROKER, "the way to the broker is not encrypted", cure)
    elif not near and "ssl_cert_reqs=none" in url.query:
        yield Risk("tls-broker", False, _WITH_BROKER, "nothing makes sure which broker answers", "remove ssl_cert_reqs")


def _of_mail(settings: Settings) -> Iterator[Risk]:
    url = urlsplit(settings.smtp.url.get_secret_value())
    if _is_known(url.username, url.password or "", needed=False):
        yield Risk("password-smtp", True, _WITH_MAIL, "the mail server's password is well known", "set another one")
    if url.scheme not in _ENCRYPTED and not url.password and not is_local(url.hostname or ""):
        cure = "smtp+starttls:// or smtps:// in SMTP__URL"
        yield Risk("tls-smtp", True, _WITH_MAIL, "the way to the mail server is not encrypted", cure)


def _of_api(settings: Settings, environment: Mapping[str, str]) -> Iterator[Risk]:
    api: dict[str, Any] = {"parts": ("api",)}
    proxies = environment.get("FORWARDED_ALLOW_IPS")
    if not settings.api.hosts:
        yield Risk(
            "hosts", True, **api, seen="any Host header is taken", cure="set API__HOSTS, or to * where all may be"
        )
    if "*" in settings.api.cors_origins:
        yield Risk(
            "cors", True, **api, seen="pages of any site may read answers", cure="name the sites in API__CORS_ORIGINS"
        )
    if proxies is None:
        cure = "set FORWARDED_ALLOW_IPS to its addresses, or to nothing where there is none"
        yield Risk("proxy", False, **api, seen="a proxy on another host would pass for every client", cure=cure)
    elif "*" in proxies:
        cure = "name the proxies in FORWARDED_ALLOW_IPS"
        yield Risk("proxy", True, **api, seen="a client may say which address it has", cure=cure)
    if settings.identity.off:
        cure = "make sure that nothing reaches the API but a gateway which refuses who may not call, then accept it"
        yield Risk("callers", False, **api, seen="nobody is asked who they are", cure=cure)
    if settings.api.docs == "on":
        seen = "/docs loads scripts from another site, and shows everybody all routes"
        yield Risk("docs", False, **api, seen=seen, cure="unset API__DOCS")
    if not settings.api.rate_limit:
        cure = "set API__RATE_LIMIT, or accept it where a proxy limits them"
        yield Risk("rate-limit", False, **api, seen="one client may send any number of requests", cure=cure)


def _of_console(settings: Settings) -> Iterator[Risk]:
    console = settings.console
    own: tuple[Part, ...] = ("console",)
    if not (console.users or console.proxy):
        return  # it does not start
    if console.users:
        cure = "set CONSOLE__PROXY to one that asks who is calling"
        yield Risk("console-users", True, own, "the console asks for passwords itself", cure)
    if any(ip_network(each).prefixlen == 0 for each in listed(console.proxy)):
        cure = "name the proxies in CONSOLE__PROXY"
        yield Risk("console-proxy", True, own, "whoever has its secret may say who is calling the console", cure)
    if console.viewer_url.get_secret_value():
        yield from _of_database(console.viewer(settings.database), own)
    else:
        seen, cure = "the console's pages are read as a role that sees payloads", "set CONSOLE__VIEWER_URL"
        yield Risk("console-payloads", False, own, seen, cure)


def _is_known(user: str | None, password: str, *, needed: bool) -> bool:
    """Whether a password is one that others know too, or is missing where one is needed."""
    return (needed or bool(password)) and password.lower() in _WELL_KNOWN | {(user or "").lower()}
