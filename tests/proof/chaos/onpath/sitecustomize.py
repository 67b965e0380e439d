"""On the PYTHONPATH of the processes under attack: Python imports it before anything of theirs."""

import os
from typing import SupportsFloat

if os.environ.get("CHAOS_GAPS"):
    import tests.proof.chaos.gaps
if os.environ.get("CHAOS_BUG"):
    import tests.proof.chaos.bugs  # noqa: F401
if os.environ.get("CHAOS_FAKED"):
    # libfaketime makes time.sleep() fail, and nothing else that is used here.
    import select
    import time

    def sleep(seconds: SupportsFloat) -> None:
        select.select((), (), (), float(seconds))

    time.sleep = sleep  # type: ignore[assignment]
