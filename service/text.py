"""Text from outside that is to be stored: replies of other servers, exceptions, headers, what a person typed.

What must stay true: a row is never refused for the words in it. PostgreSQL takes neither NUL characters nor halves of
surrogate pairs, and Python makes the latter of bytes that are no UTF-8. So whatever stores text that nobody has checked
passes it through here.
"""

from __future__ import annotations

import re

__all__ = ["storable"]

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def storable(text: str, longest: int | None = None) -> str:
    """The text as PostgreSQL can store it, with `\N{REPLACEMENT CHARACTER}` for what it cannot.

    Args:
        text: Any text.
        longest: Characters at most; an ellipsis tells where something is missing.
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
