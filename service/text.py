"""Text from outside: as it may be stored, and as a terminal may show it.

It comes from replies of other servers, exceptions, headers, and whatever a person typed. What must stay true:

- A row is never refused for the words in it. PostgreSQL takes neither NUL characters nor halves of surrogate pairs, and
  Python makes the latter of bytes that are no UTF-8. So whatever stores text that nobody has checked calls `storable`.
- Whatever a person reads on a terminal (the command line's output, logs in console format, `make dev`) went through
  `visible` last. A name, an error or a header that somebody else wrote can then neither move the cursor nor hide, turn
  around or forge a line.
"""

from __future__ import annotations

import json
import re

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_UNUSUAL = re.compile(r"[^ -~]")

TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
"""The header by which W3C's Trace Context names a trace."""


def storable(text: str, longest: int | None = None) -> str:
    """The text as PostgreSQL can store it, with `\N{REPLACEMENT CHARACTER}` for what it cannot.

    Args:
        text: Any text.
        longest: Characters at most; an ellipsis tells where something is missing.
    """
    if longest is not None and len(text) > longest:
        text = text[: longest - 1] + "…"
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def visible(text: str, keep: str = "") -> str:
    r"""Write control, format and lone surrogate characters as escapes: `\x1b`, `\u202e`.

    Args:
        text: Anything.
        keep: The control characters that belong to the layout, such as line ends.
    """
    return _UNUSUAL.sub(lambda found: _shown(found[0], keep), text)


def _shown(char: str, keep: str) -> str:
    return char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()


def visible_json(document: str) -> str:
    """The same for a JSON document, which says what it said before."""
    return _UNUSUAL.sub(lambda found: _shown_in_json(found[0]), document)


def _shown_in_json(char: str) -> str:
    return char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1]
