"""What a mail server says is kept without the addresses in it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.smtp import SMTP

from service import mail
from service.dev.sink import Sink

if TYPE_CHECKING:
    from pathlib import Path

TO = "Ada.Lovelace@Example.com"


class _Refusing(Sink):
    """Refuses every recipient with `answer`."""

    answer = ""

    async def handle_RCPT(self, *_: Any) -> str:  # noqa: N802  aiosmtpd's name
        return self.answer


@pytest.mark.parametrize(
    ("code", "raised"), [("550 5.1.1", mail.MailRefusedError), ("450 4.2.1", mail.MailDeferredError)]
)
@pytest.mark.parametrize("echoed", [TO, TO.lower(), TO.upper(), "countess@elsewhere.org", "ada.lovelace@xn--a-0ga.org"])
async def test_a_refusal_is_kept_without_addresses(
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: str,
    raised: type[Exception],
    echoed: str,
) -> None:
    async with _Refusing(tmp_path / "mails") as server:
        server.answer = f"{code} <{echoed}>: no such mailbox"
        for name, value in (environment | {"SMTP__URL": f"smtp://127.0.0.1:{await server.start()}"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(raised) as failure:
            await mail.send(TO, "subject", "text", idempotency_key="key")
    said = str(failure.value)
    assert said.startswith(code)
    assert "no such mailbox" in said
    assert "@" not in said
    assert "lovelace" not in said.casefold()


@pytest.mark.parametrize(
    "to", ["", "ada@", "@example.com", "a da@example.com", "a@b, c@d", "a@b\nBcc: c@d", "a@[1.2", "\ud800@b"]
)
async def test_what_is_no_address_is_refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, to: str
) -> None:
    async with Sink(tmp_path / "mails") as server:
        for name, value in (environment | {"SMTP__URL": f"smtp://127.0.0.1:{await server.start()}"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(mail.MailRefusedError, match="not an e-mail address"):
            await mail.send(to, "subject", "text", idempotency_key="key")


@pytest.mark.parametrize("to", ["Ada@Ex\u00e4mple.com", "\u00c4da@example.com"])
async def test_an_address_that_the_server_cannot_read_is_refused(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """One without SMTPUTF8 never will, so that a retry would not help."""
    listening = await asyncio.get_running_loop().create_server(lambda: SMTP(object()), "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        for name, value in (environment | {"SMTP__URL": f"smtp://127.0.0.1:{port}"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(mail.MailRefusedError, match="SMTPUTF8") as failure:
            await mail.send(to, "subject", "text", idempotency_key="key")
    assert "@" not in str(failure.value)
