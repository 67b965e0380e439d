"""The SMTP sink writes down what it accepts, refuses whom it is told to, and can be repaired."""

from __future__ import annotations

import asyncio
import sys
from email.message import EmailMessage
from typing import TYPE_CHECKING

import aiosmtplib
import pytest

from service.dev.servers import free_port
from service.dev.sink import Sink, read_mails
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
def rejects(tmp_path: Path) -> Path:
    return tmp_path / "reject.txt"


@pytest.fixture
def mails(tmp_path: Path) -> Path:
    return tmp_path / "mails.jsonl"


@pytest.fixture
async def port(mails: Path, rejects: Path) -> AsyncIterator[int]:
    async with Sink(mails, rejects) as sink:
        yield await sink.start()


async def _send(port: int, to: str, message_id: str = "<1@example.com>") -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.com", to, "Ünïcode ✓"
    message["Message-ID"] = message_id
    message.set_content("Hello")
    await aiosmtplib.send(message, hostname="127.0.0.1", port=port, timeout=10)


async def test_what_is_accepted_is_written_down(port: int, mails: Path) -> None:
    await _send(port, "ada@example.com")
    [mail] = read_mails(mails)
    assert (mail.message_id, mail.recipients, mail.subject) == ("<1@example.com>", ["ada@example.com"], "Ünïcode ✓")
    assert mail.sender == "shop@example.com"


async def test_copies_of_one_message_are_counted(port: int, mails: Path) -> None:
    for message_id in ("<1@example.com>", "<2@example.com>", "<1@example.com>"):
        await _send(port, "ada@example.com", message_id)
    assert [(mail.message_id, mail.copy) for mail in read_mails(mails)] == [
        ("<1@example.com>", 1),
        ("<2@example.com>", 1),
        ("<1@example.com>", 2),
    ]


async def test_recipients_are_refused_for_good_until_it_is_repaired(port: int, mails: Path, rejects: Path) -> None:
    await asyncio.to_thread(rejects.write_text, "@nowhere\\.example$")
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as refused:
        await _send(port, "ada@nowhere.example")
    assert refused.value.recipients[0].code == 550
    await _send(port, "ada@example.com")
    await asyncio.to_thread(rejects.unlink)
    await _send(port, "ada@nowhere.example")
    assert [mail.recipients for mail in read_mails(mails)] == [["ada@example.com"], ["ada@nowhere.example"]]


async def test_it_runs_as_a_process_and_stops_on_sigterm(mails: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "service.dev.sink", "--port", str(port), "--file", str(mails)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)

    async def sent() -> bool:
        try:
            await _send(port, "ada@example.com")
        except aiosmtplib.SMTPConnectError:
            return False
        return True

    try:
        await until(sent)
    finally:
        process.terminate()
        status = await asyncio.wait_for(process.wait(), 10)
    assert status == 0
    assert len(read_mails(mails)) == 1
