"""The migrations that this code knows, to compare with those that a database has."""

from __future__ import annotations

from pathlib import Path

from alembic.script import ScriptDirectory


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
