"""Sending e-mail over SMTP, at least once.

The Message-ID derives from the delivery's idempotency key, so an e-mail that had to be sent again is recognisable as
the same one.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import aiosmtplib

from service.errors import ServiceError
from service.network.sockets import tls_context
from service.settings import load_settings

if TYPE_CHECKING:
    from service.settings import SmtpSettings

# Refusals of our own account rather than of this e-mail: someone can repair it, so it is worth a retry.
_ACCOUNT_CODES = {530, 534, 535, 538}

# Servers repeat the recipient in another case, with its domain in punycode, or as what it is an alias of.
_ADDRESS = re.compile(r"""[^\s<>()\[\],;:"']+@[^\s<>()\[\],;:"']+""")

# One mailbox and nothing else. Of what is none, the libraries raise whatever it makes them stumble over.
_PART = r"""[^\s\x00-\x1f\x7f<>()\[\],;:"\\@\ud800-\udfff]+"""
_MAILBOX = re.compile(f"{_PART}@{_PART}")


class MailRefusedError(ServiceError):
    """The server refused this e-mail for good (SMTP 5xx); sending it again would not help."""


class MailDeferredError(ServiceError):
    """The e-mail could not be sent now; a retry may succeed."""


async def send(to: str, subject: str, text: str, *, idempotency_key: str) -> None:
    """Send a plain-text e-mail.

    Raises:
        MailRefusedError: the server refused it for good, or `to` is not an address that it can send to.
        MailDeferredError: anything that a retry may cure.
    """
    if not _MAILBOX.fullmatch(to):
        raise MailRefusedError("the recipient is not an e-mail address")
    settings = load_settings().smtp
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = settings.sender, to, subject
    message["Date"] = format_datetime(datetime.now(UTC))
    message["Message-ID"] = f"<{idempotency_key}@{settings.sender.rpartition('@')[2]}>"
    message.set_content(text)
    try:
        await aiosmtplib.send(message, sender=settings.sender, recipients=[to], **_connection(settings))
    except (aiosmtplib.SMTPException, OSError) as error:
        raise _judged(error, to) from None  # the original repeats the address, and this ends up in logs and errors


def _connection(settings: SmtpSettings) -> dict[str, Any]:
    url = urlsplit(settings.url.get_secret_value())
    implicit_tls = url.scheme == "smtps"
    return {
        "hostname": url.hostname,
        "port": url.port or (465 if implicit_tls else 587 if url.username else 25),
        "username": unquote(url.username) if url.username else None,
        "password": unquote(url.password) if url.password else None,
        "use_tls": implicit_tls,
        # None: encrypt where the server offers it, as between mail servers. That offer can be taken away on the way, so
        # no password depends on it.
        "start_tls": False if implicit_tls else True if url.scheme == "smtp+starttls" or url.username else None,
        "tls_context": tls_context(settings.tls_ca_file),
        "timeout": settings.timeout,
    }


def _judged(error: Exception, to: str) -> Exception:
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        error = error.recipients[0]
    if isinstance(error, aiosmtplib.SMTPNotSupported) and not to.isascii():
        return MailRefusedError("the recipient's address is not ASCII, and the mail server does not support SMTPUTF8")
    if not isinstance(error, aiosmtplib.SMTPResponseException):
        return MailDeferredError(_without_addresses(f"{type(error).__name__}: {error}", to))
    answer = _without_addresses(f"{error.code} {error.message}", to)
    about_this_mail = (aiosmtplib.SMTPRecipientRefused, aiosmtplib.SMTPSenderRefused, aiosmtplib.SMTPDataError)
    if isinstance(error, about_this_mail) and 500 <= error.code < 600 and error.code not in _ACCOUNT_CODES:
        return MailRefusedError(answer)
    return MailDeferredError(answer)


def _without_addresses(text: str, to: str) -> str:
    text = re.sub(re.escape(to), "the recipient", text, flags=re.IGNORECASE)
    return _ADDRESS.sub("an address", text)
