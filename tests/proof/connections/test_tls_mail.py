"""A password for the mail server goes nowhere but through TLS, to the server that the URL names."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult

from service import mail

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.proof.connections.certificates import Certificates


class _Server:
    """Attributes: `passwords` that were sent, `encrypted` and `plain`; `accepted` counts e-mails."""

    def __init__(self) -> None:
        self.encrypted: list[bytes] = []
        self.plain: list[bytes] = []
        self.accepted = 0

    def check(self, server: Any, session: Any, _envelope: Any, _mechanism: str, sent: Any) -> AuthResult:
        is_encrypted = server.transport.get_extra_info("ssl_object") is not None
        (self.encrypted if is_encrypted else self.plain).append(sent.password)
        return AuthResult(success=True)

    async def handle_DATA(self, _server: Any, _session: Any, _envelope: Any) -> str:  # noqa: N802  aiosmtpd's
        self.accepted += 1
        return "250 OK"


@asynccontextmanager
async def _serving(
    certificates: Certificates, certificate: str, *, implicit: bool
) -> AsyncIterator[tuple[_Server, int]]:
    handler = _Server()
    context = certificates.server(certificate) if certificate else None

    def session() -> SMTP:
        starttls = None if implicit else context
        return SMTP(
            handler,
            authenticator=handler.check,
            auth_require_tls=False,
            tls_context=starttls,
            loop=asyncio.get_running_loop(),
        )

    listening = await asyncio.get_running_loop().create_server(
        session, "127.0.0.1", 0, ssl=context if implicit else None
    )
    try:
        yield handler, listening.sockets[0].getsockname()[1]
    finally:
        listening.close()


@pytest.fixture
def environment_of_mail(monkeypatch: pytest.MonkeyPatch, certificates: Certificates) -> pytest.MonkeyPatch:
    monkeypatch.setenv("DATABASE__URL", "postgresql://user@host/service")
    monkeypatch.setenv("BROKER__URL", "redis://host")
    monkeypatch.setenv("SMTP__TLS_CA_FILE", str(certificates.ca))
    return monkeypatch


CASES = [
    # scheme, certificate ("": the server, or who sits before it, offers no TLS), whether it is sent
    ("smtp", "", False),
    ("smtp", "right", True),
    ("smtp", "self-signed", False),
    ("smtp", "other-host", False),
    ("smtp+starttls", "", False),
    ("smtp+starttls", "right", True),
    ("smtp+starttls", "other-host", False),
    ("smtps", "right", True),
    ("smtps", "self-signed", False),
    ("smtps", "other-host", False),
]


@pytest.mark.parametrize(("scheme", "certificate", "is_sent"), CASES)
async def test_with_a_password(
    environment_of_mail: pytest.MonkeyPatch, certificates: Certificates, scheme: str, certificate: str, is_sent: bool
) -> None:
    async with _serving(certificates, certificate, implicit=scheme == "smtps") as (server, port):
        environment_of_mail.setenv("SMTP__URL", f"{scheme}://user:s3cr3t@127.0.0.1:{port}")
        if is_sent:
            await mail.send("a@example.com", "s", "t", idempotency_key="k")
        else:
            with pytest.raises(mail.MailDeferredError) as refused:
                await mail.send("a@example.com", "s", "t", idempotency_key="k")
            assert "s3cr3t" not in str(refused.value)
    assert server.plain == []
    assert (server.encrypted, server.accepted) == (([b"s3cr3t"], 1) if is_sent else ([], 0))


async def test_without_a_password(environment_of_mail: pytest.MonkeyPatch, certificates: Certificates) -> None:
    """As between mail servers: encrypted where it is offered."""
    for certificate in ("", "right"):
        async with _serving(certificates, certificate, implicit=False) as (server, port):
            environment_of_mail.setenv("SMTP__URL", f"smtp://127.0.0.1:{port}")
            await mail.send("a@example.com", "s", "t", idempotency_key="k")
        assert server.accepted == 1


async def test_the_system_does_not_know_the_ca(
    environment_of_mail: pytest.MonkeyPatch, certificates: Certificates
) -> None:
    environment_of_mail.delenv("SMTP__TLS_CA_FILE")
    async with _serving(certificates, "right", implicit=True) as (server, port):
        environment_of_mail.setenv("SMTP__URL", f"smtps://user:s3cr3t@127.0.0.1:{port}")
        with pytest.raises(mail.MailDeferredError):
            await mail.send("a@example.com", "s", "t", idempotency_key="k")
    assert server.encrypted == []
