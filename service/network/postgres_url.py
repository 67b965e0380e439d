"""Reads `DATABASE__URL` once, as libpq does, for every process alike.

SQLAlchemy and asyncpg know different parameters, and neither refuses what it does not know. What must stay true is what
`urls.py` says.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from service.network.sockets import check_ca_file
from service.network.urls import ENCODED, read_query

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXPECTED = f"expected postgresql://user:password@host:5432/database, {ENCODED}"
_SEVERAL = "expected postgresql://user:password@host1:5432,host2:5432/database"

_URL = re.compile(r"postgres(?:ql)?(?:\+asyncpg)?://(?:([^:@/]*)(?::([^@]*))?@)?([^@/?]*)(?:/([^?]*))?(?:\?(.*))?")
_HOST = re.compile(r"(?:\[([^\[\]]+)\]|([^:\[\]]+))(?::(\d+))?")

_PARAMETERS = (
    "host", "port", "user", "password", "sslmode", "sslrootcert", "sslcert", "sslkey", "application_name", "options",
    "connect_timeout", "target_session_attrs",
)  # fmt: skip
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_TARGETS = ("any", "read-write", "primary")

Host = tuple[str | None, int | None]
"""Name, address or folder of a socket, and port. `None`: where the driver looks when it is not told."""


@dataclass(frozen=True, slots=True, repr=False)
class PostgresAddress:
    """What a URL says.

    Attributes:
        hosts: In the order in which they are named; at least one.
        database: Its name.
        parameters: What else there is for the driver, `user` and `password` included, as libpq names it.
        application_name: Stands behind each process's own name; may be empty.
        connect_timeout: Seconds, if the URL says so.
    """

    hosts: tuple[Host, ...]
    database: str
    parameters: Mapping[str, str]
    application_name: str
    connect_timeout: float | None

    @property
    def where(self) -> str:
        """Hosts and database, for people to read; nothing secret."""
        return ",".join(f"{host or 'localhost'}:{port or 5432}" for host, port in self.hosts) + f"/{self.database}"

    @property
    def dsn(self) -> str:
        """A URL that asyncpg reads the same of."""
        query = dict(self.parameters)
        host, port = self.hosts[0]
        if host is not None:
            query["host"] = ",".join(f"[{each}]" if each and ":" in each else f"{each}" for each, _ in self.hosts)
        if port is not None:
            query["port"] = ",".join(f"{each}" for _, each in self.hosts)
        user, password = (quote(query.pop(key, ""), safe="") for key in ("user", "password"))
        who = f"{user}:{password}" if password else user
        pairs = "&".join(f"{key}={quote(value, safe='/')}" for key, value in query.items())
        return f"postgresql://{who}@/{quote(self.database, safe='')}" + (f"?{pairs}" if pairs else "")


def read_postgres(url: str) -> PostgresAddress:
    """Read a URL.

    Raises:
        ValueError: saying what is wrong and what is expected.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise ValueError(_EXPECTED)
    user, password, before_path, database, query = found.groups(default="")
    if not database:
        raise ValueError(f"the URL names no database: {_EXPECTED}")
    given = read_query(query, _PARAMETERS)
    given |= {key: unquote(value) for key, value in (("user", user), ("password", password)) if value}
    hosts = _hosts(before_path, given.pop("host", ""), given.pop("port", ""))
    if len(hosts) > 1:
        given.setdefault("target_session_attrs", "read-write")
    _check(given)
    name, patience = given.pop("application_name", ""), given.pop("connect_timeout", None)
    return PostgresAddress(hosts, unquote(database), given, name, float(patience) if patience else None)


def _hosts(before_path: str, in_query: str, ports: str) -> tuple[Host, ...]:
    if before_path and (in_query or ports):
        raise ValueError("the URL names hosts or ports twice, before its path and after the ?")
    if not before_path and not in_query:
        return ((None, _port(ports) if ports else None),)
    named = [_HOST.fullmatch(_in_brackets(each) if in_query else each) for each in (before_path or in_query).split(",")]
    each_port = ports.split(",") if "," in ports else [ports] * len(named)
    if len(each_port) != len(named) or not all(named):
        raise ValueError(_SEVERAL)
    return tuple(
        (unquote(host[1] or host[2]), _port(host[3] or port or "5432"))
        for host, port in zip(named, each_port, strict=True)
        if host
    )


def _in_brackets(host: str) -> str:
    """An address of IPv6 needs none where its port stands elsewhere."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or not 0 < int(text) < 65_536:
        raise ValueError(f"a port is a number from 1 to 65535: {_SEVERAL}")
    return int(text)


def _check(given: Mapping[str, str]) -> None:
    if given.get("sslmode", "prefer") not in _SSL_MODES:
        raise ValueError(f"sslmode: expected one of {', '.join(_SSL_MODES)}")
    if given.get("target_session_attrs", "any") not in _TARGETS:
        raise ValueError(f"target_session_attrs: expected one of {', '.join(_TARGETS)}, because the service writes")
    if not re.fullmatch(r"[1-9]\d{0,3}", given.get("connect_timeout", "5")):
        raise ValueError("connect_timeout: expected whole seconds, from 1 to 9999")
    if "sslkey" in given and "sslcert" not in given:
        raise ValueError("sslkey: there is no sslcert")
    try:
        check_ca_file(given.get("sslrootcert", ""))
    except ValueError as error:
        raise ValueError(f"sslrootcert: {error}") from None
    if certificate := given.get("sslcert"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, given.get("sslkey"), password="")
        except (OSError, ValueError):
            raise ValueError("sslcert, sslkey: expected a certificate and its key in PEM, without passphrase") from None
