"""On the PYTHONPATH of the processes under attack: Python imports it before anything of theirs."""

import os

if os.environ.get("CHAOS_GAPS"):
    import tests.chaos.gaps  # noqa: F401
if os.environ.get("CHAOS_BUG"):
    import tests.chaos.bugs  # noqa: F401
