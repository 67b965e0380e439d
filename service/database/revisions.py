"""The migrations that this code knows, and those that a database has.

What must stay true: a schema that is newer than this code lacks nothing. Migrations run before the new version is
rolled out, and the old one has to serve until then.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alembic.script import ScriptDirectory

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable


async def applied(ask: Callable[[str], Awaitable[Iterable[str | None]]]) -> set[str] | None:
    """The migrations that the database has; `None` if it has no table of them that this role sees.

    Args:
        ask: Runs a statement on a connection of whatever kind, for its first column.
    """
    if not any(await ask("SELECT to_regclass('alembic_version')::text")):
        return None
    return {version for version in await ask("SELECT version_num FROM alembic_version") if version}


class Revisions:
    """The migrations this code knows.

    Raises:
        alembic.util.CommandError: where there is no folder `migrations`.
    """

    def __init__(self) -> None:
        # Beside the service in a checkout, in the working directory where the package is installed elsewhere.
        beside, here = Path(__file__).resolve().parents[2] / "migrations", Path.cwd() / "migrations"
        root = beside if beside.is_dir() else here
        scripts = ScriptDirectory(str(root), version_locations=[str(root / "ledger"), str(root / "domains")])
        self.heads = set(scripts.get_heads())
        self.known = {script.revision for script in scripts.walk_revisions()}

    def missing(self, applied: set[str]) -> set[str]:
        """The heads that the database lacks; a revision that this code does not know stands for a newer head."""
        missing = self.heads - applied
        return missing if len(missing) > len(applied - self.known) else set()
