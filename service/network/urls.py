"""Reads the URLs of the broker, the mail server and the issuer once, for every process alike; `postgres_url.py` has the
fourth.

Each process hands its URL to other libraries, which disagree about what may stand in one. What must stay true: what is
accepted here means the same to all of them, and the rest is refused at start; and no message repeats anything of a URL
but a parameter's name, because any other part of it may be the password.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Collection
    from urllib.parse import SplitResult

ENCODED = "with : / ? # @ % , ; in user and password percent-encoded"
_BROKER = f"expected redis://host:6379/0, valkey://host:6379/0 or amqp://user:password@host:5672/, {ENCODED}"
_SMTP = (
    "expected smtp://host:1025, smtp+starttls://user:password@host:587 or smtps://user:password@host:465, " + ENCODED
)
_KEYS = "expected https://host/path or file:///path; http:// is for this machine alone"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

_REDIS = ("redis", "rediss", "valkey", "valkeys", "unix")
_REDIS_PARAMETERS = (
    "db", "username", "password", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname",
)  # fmt: skip
_AMQP = ("amqp", "amqps")
_NAME = re.compile(r"[a-z_]{1,40}")


def read_query(query: str, known: Collection[str]) -> dict[str, str]:
    """A query's parameters that are not empty. A plus is a plus, unlike in a form.

    Raises:
        ValueError: when there are others than the known ones.
    """
    found = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if key not in known:
            what = f"the parameter {key}" if equals and _NAME.fullmatch(key) else "something after the ?"
            raise ValueError(f"{what} is not known here; known are {', '.join(known)}")
        if value:
            found[key] = unquote(value)
    return found


def without_secrets(url: str) -> str:
    """What a person may read of it: neither user and password nor parameters."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def with_password(url: str, password: str) -> str:
    """The URL with this password, whatever characters it has.

    Raises:
        ValueError: when the URL names one already.
    """
    scheme, separator, rest = url.partition("://")
    before_path = re.split("[/?#]", rest, maxsplit=1)[0]
    user, _, hosts = before_path.rpartition("@")
    if ":" in user:
        raise ValueError("the password stands in the URL and apart from it: remove one of the two")
    return f"{scheme}{separator}{user}:{quote(password, safe='')}@{hosts}{rest.removeprefix(before_path)}"


def is_local(host: str) -> bool:
    """Whether it is this machine, by its name or an address of the loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_broker(url: str) -> None:
    """Refuse what relay, workers and command line would not read alike.

    Raises:
        ValueError: saying what is wrong and what is expected.
    """
    parts = _split(url, (*_REDIS, *_AMQP), _BROKER)
    if parts.scheme in _AMQP:
        _check_amqp(parts)
        return
    given = read_query(parts.query, _REDIS_PARAMETERS)
    numbers = [given.get("db", "0"), "0" if parts.scheme == "unix" else parts.path.removeprefix("/") or "0"]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"the database is no number: {_BROKER}")
    if given.get("ssl_cert_reqs", "required") not in ("required", "none"):
        raise ValueError("ssl_cert_reqs: expected required or none")


def _check_amqp(parts: SplitResult) -> None:
    if (parts.username is None) != (parts.password is None):
        raise ValueError(f"give both user and password, or neither: {_BROKER}")
    if not re.fullmatch(r"(/[^/@]*)?", parts.path):
        raise ValueError("after the host comes one virtual host, with / in its name as %2F")
    heartbeat = read_query(parts.query, ("heartbeat",)).get("heartbeat", "0")
    if not re.fullmatch(r"\d{1,4}", heartbeat):
        raise ValueError("heartbeat: expected whole seconds")


def check_smtp(url: str) -> None:
    """Refuse what is no mail server.

    Raises:
        ValueError: saying what is expected.
    """
    parts = _split(url, ("smtp", "smtp+starttls", "smtps"), _SMTP)
    if parts.path not in ("", "/") or parts.query:
        raise ValueError(_SMTP)


def check_keys(url: str) -> str:
    """Give back a URL to read keys from, or none, unless somebody on the way could exchange them.

    Raises:
        ValueError: saying what is expected.
    """
    if url and not re.match("file:///.", url):
        parts = _split(url, ("https", "http"), _KEYS)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise ValueError(_KEYS)
    return url


def _split(url: str, schemes: Collection[str], expected: str) -> SplitResult:
    if url.partition("://")[0] not in schemes:
        raise ValueError(expected)
    try:
        parts = urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2]
        if re.search("[,;]", hosts):
            raise ValueError(f"it names several hosts, and only DATABASE__URL may: {expected}")
        valid = parts.port != 0 and bool(parts.hostname) != (parts.scheme == "unix") and not parts.fragment
    except ValueError as error:
        # The standard library's own messages quote from the URL.
        raise ValueError(str(error) if str(error).endswith(expected) else expected) from None
    if not valid:
        raise ValueError(expected)
    return parts
