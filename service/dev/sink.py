"""An SMTP server that delivers nothing: it writes down what it accepted, one JSON object a line.

`python -m service.dev.sink --port 1025 --file mails.jsonl --reject-file rejects.txt`

While the reject file holds a regular expression, recipients that match it are refused for good (550). Empty or remove
the file and the sink is repaired.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING, Self

from aiosmtpd.smtp import SMTP

from service.text import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiosmtpd.smtp import Envelope, Session


@dataclass(frozen=True)
class Mail:
    """One accepted message. `copy` counts the messages with this Message-ID, from 1."""

    received_at: str
    message_id: str
    sender: str
    recipients: list[str]
    subject: str
    copy: int


def read_mails(file: Path) -> list[Mail]:
    """What a sink wrote into its file so far, in the order in which it was accepted."""
    if not file.exists():
        return []
    return [Mail(**json.loads(line)) for line in file.read_text().splitlines()]


class Sink:
    """The server, within an event loop.

    Args:
        file: Where accepted messages are written.
        reject_file: Holds the regular expression of recipients to refuse.
        delay: Seconds between writing a message down and accepting it.
    """

    def __init__(self, file: Path, reject_file: Path | None = None, delay: float = 0) -> None:
        self._file = file
        self._reject_file = reject_file
        self._delay = delay
        self._copies = Counter(mail.message_id for mail in read_mails(file))
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> int:
        """Listen on a loopback port, any free one for 0, and return it."""
        # The lambda runs on the loop that accepted the connection, where aiosmtpd wants to be made.
        self._server = await asyncio.get_running_loop().create_server(
            lambda: SMTP(self, hostname="sink.localhost", ident="sink", enable_SMTPUTF8=True, timeout=60),
            "127.0.0.1",
            port,
        )
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _refuses(self, address: str) -> bool:
        try:
            pattern = self._reject_file.read_text().strip() if self._reject_file is not None else ""
        except FileNotFoundError:
            return False
        return bool(pattern) and re.search(pattern, address) is not None

    async def handle_RCPT(  # noqa: N802  aiosmtpd's name
        self,
        _server: SMTP,
        _session: Session,
        envelope: Envelope,
        address: str,
        _options: list[str],
    ) -> str:
        """Refuse or accept a recipient."""
        if self._refuses(address):
            return f"550 5.1.1 <{address}>: no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Write the message down, and only then accept it."""
        content = envelope.content
        message = message_from_bytes(content if isinstance(content, bytes) else b"", policy=policy.default)
        message_id = str(message.get("Message-ID", "")).strip()
        self._copies[message_id] += 1
        mail = Mail(
            received_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            message_id=message_id,
            sender=envelope.mail_from or "",
            recipients=list(envelope.rcpt_tos),
            subject=str(message.get("Subject", "")),
            copy=self._copies[message_id],
        )
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(mail)) + "\n")
        again = f", copy {mail.copy}" if mail.copy > 1 else ""
        print(visible(f"to {', '.join(mail.recipients)}: {mail.subject} ({message_id}{again})"), flush=True)
        if self._delay:  # the message is here, and the sender does not know it yet
            await asyncio.sleep(self._delay)
        return "250 2.0.0 Ok"


async def _serve(arguments: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Sink(arguments.file, arguments.reject_file, arguments.delay) as sink:
        port = await sink.start(arguments.port)
        print(f"listening on smtp://127.0.0.1:{port}, writing to {arguments.file}", flush=True)
        await stopped.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="An SMTP server that only writes down what it accepts.")
    parser.add_argument("--port", type=int, default=0, help="loopback port; 0 takes any free one")
    parser.add_argument("--file", type=Path, required=True, help="where to write accepted messages")
    parser.add_argument("--reject-file", type=Path, help="regular expression of recipients to refuse with 550")
    parser.add_argument(
        "--delay", type=float, default=0, help="seconds between writing a message down and accepting it"
    )
    asyncio.run(_serve(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
