"""`make dev`: the stack stays up until Ctrl-C and its data survives; `make reset` deletes the data."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from service.dev import dev_console, stack
from service.dev.issuer import DevIssuer, every_scope, is_ours
from service.dev.places import ROOT, ServerError, clone_data
from service.dev.postgres import Postgres
from service.dev.processes import Process, Supervisor, stop_all, to_terminal
from service.dev.reload import Watch, shown
from service.dev.servers import free_port
from service.network.postgres_url import read_postgres
from service.network.urls import without_secrets
from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def run() -> int:
    """Run everything until Ctrl-C."""
    with stack.clone_lock() as ours:
        if not ours:
            raise ServerError("`make dev` runs already for this clone; stop it first (Ctrl-C in its terminal)")
        data = clone_data()
        print(f"starting; the data is kept in {data}", flush=True)
        with stack.embedded_servers(_environment(), data, lasting=True) as given:
            stack.migrate(given)
            _run_processes(given)
    print("stopped; the data is kept (`make reset` deletes it)")
    return 0


def _environment() -> dict[str, str]:
    given = stack.configured()
    callers = dev_issuer().variables if is_ours(given) else {}
    operators = dev_console.variables(clone_data(), given)
    return {"LOG_FORMAT": "console"} | callers | operators | given | {"PYTHONUNBUFFERED": "1"}


def dev_issuer() -> DevIssuer:
    """The issuer of this clone's tokens."""
    return DevIssuer(clone_data() / "identity")


def print_token(subject: str, scopes: list[str]) -> int:
    """A token that `make dev` believes, with these scopes or with all there are."""
    if not is_ours(stack.configured()):
        raise ServerError("IDENTITY__ settings are there: get a token from the issuer that they name")
    print(dev_issuer().token(subject, scopes or every_scope()))
    return 0


def _run_processes(environment: dict[str, str]) -> None:
    port = _port_near(int(environment.get("PORT", "8000")))
    processes = _processes(environment, port)
    groups = [[process for process in processes if process.name.startswith(kind)] for kind in _STOP_ORDER]
    stack.note_running({key: environment[key] for key in _GIVEN})
    watch = Watch(ROOT)
    ready = False
    try:
        for process in processes:
            process.start()
        supervisor = Supervisor(processes)
        while True:
            look(watch, processes, supervisor)
            if not ready and (ready := answers(port)):
                _say_where(port, environment, processes)
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("\nstopping (Ctrl-C again: at once)", flush=True)
    finally:
        try:
            for group in groups:
                stop_all(group)
        finally:
            for process in processes:
                process.kill()


def look(watch: Watch, processes: list[Process], supervisor: Supervisor) -> None:
    """Start again what ended, and after a save what reads the code and `.env`. The servers stay, where they are too."""
    if changed := watch.changed():
        reading = [process for process in processes if process.name != "mail"]
        start = "start" if reading[1:] else "starts"
        print(f"-- {shown(changed)} changed: {', '.join(each.name for each in reading)} {start} again --", flush=True)
        if ".env" in changed:
            _give_environment(reading)
        supervisor.restart(reading)
    supervisor.look()


def _give_environment(processes: list[Process]) -> None:
    try:
        wanted = _environment()
    except (OSError, ValueError) as error:
        print(visible(f"-- .env cannot be read: {error} --"), flush=True)
        return
    for process in processes:
        given = {name: process.environment[name] for name in (*_GIVEN, *_PORTS) if name in process.environment}
        process.environment = wanted | given
    given = processes[0].environment
    if moved := [name for name in _GIVEN if wanted.get(name, given[name]) != given[name]]:
        print(f"-- {', '.join(moved)}: counts from the next `make dev` on --", flush=True)


_GIVEN = (*stack.URLS, "SMTP__URL")
"""What servers may have been started for: it stays as it is until the end."""

_METRICS = "METRICS__PORT"
_PORTS = (_METRICS, dev_console.PORT)
_MEASURED = ("api", "relay")
"""Each of these processes has another one, since they share the machine."""

_REFUSED = "@nowhere\\.example$\n"
_STOP_ORDER = ("api", "console", "worker", "relay", "mail")


def _processes(environment: dict[str, str], port: int) -> list[Process]:
    """What runs beside the servers. Sets `SMTP__URL` if the sink is ours to start."""
    commands: dict[str, list[str]] = {}
    if "SMTP__URL" not in environment:
        smtp_port = _port_near(1025)
        environment["SMTP__URL"] = f"smtp://127.0.0.1:{smtp_port}"
        commands["mail"] = stack.sink_command(smtp_port, clone_data() / "mails.jsonl", _reject_file())
    commands |= {"api": stack.api_command(port), "relay-1": stack.relay_command(), "relay-2": stack.relay_command()}
    for number in (1, 2):
        commands[f"worker-{number}"] = stack.worker_command(processes=1, threads=8)
    if dev_console.has_console():
        environment[dev_console.PORT] = str(_port_near(int(environment.get(dev_console.PORT, "8001"))))
        commands["console"] = dev_console.COMMAND
    write = to_terminal(commands)
    processes = [Process(name, command, environment, write) for name, command in commands.items()]
    for number, process in enumerate(each for each in processes if each.name.startswith(_MEASURED)):
        process.environment[_METRICS] = str(_port_near(9464 + number))
    return processes


def _reject_file() -> Path:
    """What the mail server refuses, so that there are dead letters to see. An emptied file stays empty."""
    file = clone_data() / "reject.txt"
    if not file.exists():
        file.write_text(_REFUSED)
    return file


def _port_near(wanted: int) -> int:
    """The customary port, so that bookmarks survive a restart; any free one if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return free_port()
    return wanted


def answers(port: int) -> bool:
    """Whether the API is ready."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False, timeout=2).is_success
    except httpx.HTTPError:
        return False


def _say_where(port: int, environment: Mapping[str, str], processes: list[Process]) -> None:
    url = f"http://127.0.0.1:{port}"
    lines = ["", f"API        {url}   (try it in a browser: {url}/docs)"]
    if dev_console.has_console():
        lines += [f"console    {dev_console.says(clone_data(), environment)}"]
    lines += [f"database   {read_postgres(environment['DATABASE__URL']).where}"]
    lines += [f"broker     {without_secrets(environment['BROKER__URL'])}"]
    lines += [f"mail       {without_secrets(environment['SMTP__URL'])}"]
    for each in processes:
        if each.name.startswith(_MEASURED):
            lines.append(f"metrics    http://127.0.0.1:{each.environment[_METRICS]}/metrics   ({each.name})")
    lines += ['settings   eval "$(.venv/bin/python -m service.dev env)", then for example: .venv/bin/outbox status']
    with suppress(httpx.HTTPError):  # what answers is being changed, and may fail
        lines += _things_to_try(url, refuses=any(process.name == "mail" for process in processes))
    print("\n".join([*lines, ""]), flush=True)


def _things_to_try(url: str, *, refuses: bool) -> list[str]:
    if not stack.has_example():
        return []
    token = dev_issuer().token("ada", every_scope()) if is_ours(stack.configured()) else ""
    lines = ["", "Place an order and watch the log:", "", stack.example().try_it(url, token, refused=refuses)]
    if refuses:
        lines += [
            "",
            "With an e-mail @nowhere.example, which the mail server refuses, it ends as a dead letter, as the first",
            "order did, which was placed for you. Repair it:",
        ]
        lines += [f"empty {_reject_file()}", ".venv/bin/outbox dead-letters replay --all   (after that `eval`)"]
    return lines


def reset() -> int:
    """Delete the data of `make dev`, after asking."""
    with stack.clone_lock() as ours:
        if not ours:
            raise ServerError("`make dev` runs; stop it first (Ctrl-C in its terminal)")
        data = clone_data()
        found = [path for path in data.iterdir() if path.name != "lock"]
        for name in stack.URLS:
            if name in stack.configured():
                print(f"{name} is set: what it points to is yours and stays as it is")
        if not found:
            print("there is nothing to delete")
            return 0
        print(f"this deletes what `make dev` kept in {data}: database, broker and e-mails")
        if not _confirmed():
            return 1
        Postgres(data / "postgres").stop_stray()
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print("deleted")
    return 0


def _confirmed() -> bool:
    if os.environ.get("YES") == "1":
        return True
    if not sys.stdin.isatty():
        print("nothing was deleted: there is nobody to ask; say `make reset YES=1`", file=sys.stderr)
        return False
    return input("delete it? [y/N] ").strip().lower() in ("y", "yes")
