"""API keys, for machines that have no issuer to ask.

What must stay true: only the SHA-256 of a key is kept. That suffices because a key is 32 random bytes; a password would
need a slow hash, so that what does not look like a key is refused unread.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.settings import ApiKey

_KEY = re.compile(r"key_[A-Za-z0-9_-]{43}")


def new_api_key() -> str:
    """A key, to be given to a machine and kept by nobody else."""
    return f"key_{secrets.token_urlsafe(32)}"


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def looks_like_api_key(text: str) -> bool:
    """Whether it is one, known or not."""
    return _KEY.fullmatch(text) is not None


def machine_of(key: str, known: Iterable[ApiKey]) -> ApiKey | None:
    """Whose key it is. It takes as long whichever it is, and however much of it is right."""
    given, found = digest(key), None
    for each in known:
        if hmac.compare_digest(each.sha256, given):
            found = each
    return found
