"""Text that came from outside, as a terminal may show it.

What must stay true: whatever a person reads on a terminal (the command line's output, logs in console format, `make
dev`) went through here last. A name, an error or a header that somebody else wrote can then neither move the cursor
nor hide, turn around or forge a line.
"""

from __future__ import annotations

import json
import re

__all__ = ["visible", "visible_json"]

_UNUSUAL = re.compile(r"[^ -~]")


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
