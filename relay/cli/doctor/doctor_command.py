"""The command `outbox doctor`."""

from __future__ import annotations

import asyncio
from collections import Counter
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from relay.cli.command import Exit, Json
from relay.cli.doctor.findings import Level
from relay.cli.output import line, plain, print_json, screen_width
from service.settings import load_settings

if TYPE_CHECKING:
    from relay.cli.doctor.findings import Finding
    from service.settings import Settings

_BESIDE = 9
_INDENT = _BESIDE + 16


def doctor(
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for an advice, too.")] = False,
    json_: Json = False,
) -> int:
    """Say what is wrong around the outbox. And what to do; it changes nothing.

    It looks with the settings and the database role that it is started with: run
    it beside the relay, and with a worker's environment, too.
    """
    findings = asyncio.run(_examine(load_settings()))
    counted = Counter(each.level for each in findings)
    problems, advice = counted[Level.PROBLEM], counted[Level.ADVICE]
    if json_:
        print_json({"problems": problems, "advice": advice, "findings": [each._asdict() for each in findings]})
    else:
        for each in findings:
            line(_text(each))
        line(f"\n{_counted(problems, 'problem')}, {_counted(advice, 'piece')} of advice.")
    return Exit.FAILED if problems or (strict and advice) else Exit.OK


async def _examine(settings: Settings) -> list[Finding]:
    # Alembic and the brokers' clients take most of a second to load, which no other command should wait for.
    from relay.cli.doctor.database import check_database
    from relay.cli.doctor.open_to_the_world import check_risks
    from relay.cli.doctor.outside import check_broker_and_queues, check_encryption

    database, others = await asyncio.gather(check_database(settings), check_broker_and_queues(settings))
    return [*database, *others, *check_encryption(settings), *check_risks(settings)]


def _text(finding: Finding) -> str:
    head = f"{finding.level:<{_BESIDE}}{finding.check:<{_INDENT - _BESIDE}}"
    gap = " " * _INDENT
    lines = wrap(head + plain(finding.seen), screen_width(), subsequent_indent=gap, break_on_hyphens=False)
    if finding.cure:
        lines += wrap(
            plain(finding.cure), screen_width(), initial_indent=f"{gap}-> ", subsequent_indent=f"{gap}   ",
            break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
