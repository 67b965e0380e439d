"""The table of licences in `docs/packages.md`, written by `python -m tests.service.docs.licences_table`."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata

from service.dev.places import ROOT
from tests.service.docs.pages import DOCS

__all__ = ["BEGIN", "END", "PACKAGES", "licences_table"]

PACKAGES = DOCS / "packages.md"
BEGIN, END = "<!-- licences -->", "<!-- /licences -->"

_PIN = re.compile(r"^([\w.-]+)==[^\s;]+( ;)?", re.MULTILINE)


def licences_table() -> str:
    """One row for each package of the image that is not only for some versions of Python or systems."""
    rows = ["| package | licence, as it says itself |", "|---|---|"]
    for name, condition in _PIN.findall((ROOT / "requirements.lock").read_text()):
        if not condition:
            rows.append(f"| `{name}` | {_licence(name)} |")
    return "\n".join(rows)


def _licence(package: str) -> str:
    try:
        said = metadata(package)
    except PackageNotFoundError:
        return "not installed here"
    named = next((said[field] for field in ("License-Expression", "License") if field in said), "")
    classified = [each.rpartition(" :: ")[2] for each in said.get_all("Classifier", []) if each.startswith("License")]
    return named if named and len(named) < 60 else ", ".join(classified)


if __name__ == "__main__":
    page = PACKAGES.read_text()
    section = f"{BEGIN}\n\n{licences_table()}\n\n{END}"
    PACKAGES.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, page, flags=re.DOTALL))
