"""A database whose roles have the grants of `migrations/roles.sql`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import uuid4

import pytest

from service.dev.places import ROOT, postgres_binaries
from service.dev.postgres import psql
from tests.servers.real_servers import TEMPLATE, migrate
from tests.service.deploy import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.servers.real_servers import Where


@dataclass(frozen=True)
class Roles:
    """URLs of one database for the roles that may connect to it."""

    superuser: str
    admin: str
    migrator: str
    app: str
    relay: str
    viewer: str


def apply_roles(url: str) -> None:
    """Run the file as its first lines say."""
    command = [str(postgres_binaries() / "psql"), "-X", "-q", "-f", str(ROOT / "migrations" / "roles.sql"), url]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _database(servers: Where, options: str, pattern: str = "roles_{}") -> Iterator[Roles]:
    name = pattern.format(f"{os.getpid()}_{uuid4().hex[:8]}")
    quoted, roles = _quoted(name), {role: f"{name}_{role}" for role in ("admin", "migrator", "app", "relay", "viewer")}
    psql(servers.postgres, f"CREATE ROLE {_quoted(roles['admin'])} LOGIN CREATEROLE")
    psql(servers.postgres, f"CREATE DATABASE {quoted} OWNER {_quoted(roles['admin'])} {options}")
    url = servers.postgres.replace("/postgres?", f"/{quote(name)}?")
    yield Roles(
        superuser=url, **{role: url.replace("postgres@", f"{quote(login)}@", 1) for role, login in roles.items()}
    )
    psql(servers.postgres, f"DROP DATABASE {quoted} WITH (FORCE)")
    for login in roles.values():
        psql(servers.postgres, f"DROP ROLE IF EXISTS {_quoted(login)}")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@pytest.fixture
def empty_database(servers: Where) -> Iterator[Roles]:
    """An empty database and its owner, who is no superuser; there are no other roles yet."""
    yield from _database(servers, "")


@pytest.fixture(params=["My-Roles {}", "2.roles_{}", 'we"ird {}', "rôles'{}"])
def awkwardly_named_database(servers: Where, request: pytest.FixtureRequest) -> Iterator[Roles]:
    """An empty database whose name, and so those of its roles, need quotes."""
    yield from _database(servers, "", request.param)


@pytest.fixture
def migrated_database(servers: Where) -> Iterator[Roles]:
    """A migrated database whose tables belong to a superuser."""
    yield from _database(servers, f'TEMPLATE "{TEMPLATE}" STRATEGY WAL_LOG')


@pytest.fixture
def roles(empty_database: Roles) -> Roles:
    """A database migrated by its migrator, with a table of a domain."""
    apply_roles(empty_database.admin)
    migrate(empty_database.migrator)
    apply_roles(empty_database.admin)
    psql(empty_database.migrator, app.SCHEMA)
    return empty_database
