"""`python -m service.dev dev|demo|token|reset|migrate|downgrade|migration|env`: what the Makefile's targets run."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from service.dev import up
from service.dev.places import ROOT
from service.dev.stack import (
    URLS,
    clone_lock,
    clone_servers,
    configured,
    example,
    has_example,
    migrate,
    run_alembic,
    running_environment,
    undo,
)
from service.errors import ServiceError
from service.text import visible

if TYPE_CHECKING:
    from types import FrameType


def _demo() -> int:
    if not has_example():
        print("the demo shows the example domain, which this checkout no longer has; try `make dev`", file=sys.stderr)
        return 1
    status: int = example().run()
    return status


def _migrate() -> int:
    with clone_servers() as environment:
        migrate(environment)
    print("the database is up to date")
    return 0


def _downgrade() -> int:
    with clone_servers() as environment:
        undo(environment)
    print("undid the latest migration of `domains`; `make migrate` applies it again")
    return 0


def _migration(message: str) -> int:
    if not message.strip():
        print('say what it does: make migration m="Add coupons"', file=sys.stderr)
        return 2
    with clone_servers() as environment:
        migrate(environment)
        place = ["--head", "domains@head", "--version-path", str(ROOT / "migrations" / "domains")]
        done = run_alembic(environment, "revision", "--autogenerate", "-m", message, *place)
    print((done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip())
    return done.returncode


def _env() -> int:
    given = configured()
    with clone_lock() as ours:
        if not ours:
            given |= running_environment()
    if missing := [name for name in URLS if name not in given]:
        verb = "are" if missing[1:] else "is"
        print(f"`make dev` does not run, and {' and '.join(missing)} {verb} not set", file=sys.stderr)
        return 1
    for name in (*URLS, "SMTP__URL"):
        if name in given:
            print(f"export {name}={shlex.quote(given[name])}")
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run a command; what can go wrong is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m service.dev")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("dev", help="run everything until Ctrl-C")
    commands.add_parser("demo", help="kill things under load and count what was lost")
    commands.add_parser("reset", help="delete the data of `dev`")
    commands.add_parser("migrate", help="bring the database of `dev` up to date")
    commands.add_parser("downgrade", help="undo the latest migration of `domains` in it")
    commands.add_parser("migration", help="write a migration from the models").add_argument("message")
    token = commands.add_parser("token", help="print a token that `dev` believes")
    token.add_argument("subject", nargs="?", default="ada")
    token.add_argument("scope", nargs="*")
    commands.add_parser("env", help="print the URLs of the running `dev`, for eval in a shell")
    arguments = parser.parse_args()
    actions = {"dev": up.run, "demo": _demo, "reset": up.reset, "migrate": _migrate,
               "downgrade": _downgrade, "env": _env}  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        if arguments.command == "migration":
            return _migration(arguments.message)
        if arguments.command == "token":
            return up.print_token(arguments.subject, arguments.scope)
        return actions[arguments.command]()
    except ServiceError as error:
        print(visible(f"error: {error}", keep="\n"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
