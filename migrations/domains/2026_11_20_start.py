"""Start the domains' own branch; it creates nothing, and every migration of yours descends from it.

Revision: domains_0000
"""

from __future__ import annotations

revision = "domains_0000"
down_revision = None
branch_labels = ("domains",)
depends_on = None


def upgrade() -> None:
    pass


def downgrade() -> None:
    pass
