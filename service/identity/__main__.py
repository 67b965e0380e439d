"""`python -m service.identity NAME [SCOPE ...]`: a new API key, and what the settings need to know of it."""

from __future__ import annotations

import argparse
import json
import sys

from service.identity.api_keys import digest, new_api_key
from service.settings import ApiKey


def main() -> None:
    """Print the key once; it is kept nowhere."""
    parser = argparse.ArgumentParser(prog="python -m service.identity", description="Make an API key.")
    parser.add_argument("name", help="the machine, which owns what it stores under this name")
    parser.add_argument("scope", nargs="*", help="what it may do, such as orders:read")
    given = parser.parse_args()
    key = new_api_key()
    try:
        ApiKey(name=given.name, sha256=digest(key), scopes=given.scope)
    except ValueError:
        parser.error("a name has letters, digits, dots, dashes and underscores, 64 at most")
    entry = {"name": given.name, "sha256": digest(key), "scopes": given.scope}
    sys.stdout.write(f"give to {given.name}, and keep nowhere else:\n  {key}\n")
    sys.stdout.write(f"add to the list in IDENTITY__API_KEYS:\n  {json.dumps(entry)}\n")


if __name__ == "__main__":
    main()
