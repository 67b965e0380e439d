"""`python -m service.console`: the console, until SIGTERM or Ctrl-C; `user NAME ROLE ...` makes a local user."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import sys
from typing import get_args

import uvicorn

from service.console.console_app import create_console
from service.console.passwords import hashed
from service.errors import ConfigurationError
from service.http.protocol import BoundedProtocol
from service.production import exit_if_unsafe
from service.settings import ConsoleRole, ConsoleUser, refuse_to_start, settings_at_start
from service.telemetry.logs import configure_logging


def serve() -> None:
    """Serve the console where the settings say."""
    settings = settings_at_start("console")
    configure_logging(settings.log_format, settings.log_level)
    exit_if_unsafe(settings, "console")
    try:
        app = create_console(settings)
    except ConfigurationError as error:
        refuse_to_start("console", error)
    logging.getLogger("uvicorn.access").disabled = True  # `http.request` says it, with the correlation id
    uvicorn.run(
        app,
        host=settings.console.host,
        port=settings.console.port,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        proxy_headers=False,  # whoever is believed to be a proxy has the address that it has
        server_header=False,
        timeout_graceful_shutdown=10,
    )


def make_user(name: str, roles: list[str]) -> None:
    """Print a new password once, and what the settings need to know of it."""
    password = secrets.token_urlsafe(15)
    user = {"name": name, "scrypt": hashed(password), "roles": roles}
    ConsoleUser.model_validate(user)
    sys.stdout.write(f"password of {name}, which is kept nowhere:\n  {password}\n")
    sys.stdout.write(f"add to the list in CONSOLE__USERS:\n  {json.dumps(user)}\n")


def main() -> None:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m service.console", description="The operators' console.")
    commands = parser.add_subparsers(dest="command")
    user = commands.add_parser("user", help="make a local user, for development")
    user.add_argument("name")
    user.add_argument("role", nargs="+", choices=get_args(ConsoleRole))
    given = parser.parse_args()
    if given.command is None:
        serve()
        return
    try:
        make_user(given.name, given.role)
    except ValueError:
        parser.error("a name has letters, digits, dots, dashes and underscores, 64 at most")


if __name__ == "__main__":
    main()
