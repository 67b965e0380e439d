"""What a mail server says is kept without the addresses in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

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
