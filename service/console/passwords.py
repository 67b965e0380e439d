"""Passwords of local users, of which only a slow hash is kept.

What must stay true: checking one takes as long whether the user exists or not, and never more memory than one check
needs, however many come at once.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading

_COST: dict[str, int] = {"n": 2**14, "r": 8, "p": 5, "maxmem": 64 * 2**20}
"""What OWASP advises of scrypt: 16 MiB, and about 0.2 s."""

LONGEST = 256
"""Characters of a password."""

_one_at_a_time = threading.Lock()


def hashed(password: str, salt: bytes | None = None) -> str:
    """What is kept of a password: the salt and the hash."""
    salt = os.urandom(16) if salt is None else salt
    with _one_at_a_time:
        return f"{salt.hex()}:{hashlib.scrypt(password.encode(), salt=salt, dklen=32, **_COST).hex()}"


def fits(password: str, kept: str | None) -> bool:
    """Whether it is the password; of nobody, none is."""
    salt, _, _ = (kept or "00" * 16).partition(":")
    made = hashed(password[:LONGEST], bytes.fromhex(salt))
    return kept is not None and hmac.compare_digest(made, kept)
