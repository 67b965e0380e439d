"""The worker process of the schedules' tests: `dramatiq tests.proof.schedules.app:setup_broker`.

`DECLARED` names what its code declares: `night=0 3 * * *;day=0 15 * * *`.
"""

from __future__ import annotations

import os

from service.outbox import scheduled
from tests.proof.schedules.domain import Beat
from tests.servers.broker import setup_broker

__all__ = ["setup_broker"]

for _each in filter(None, os.environ.get("DECLARED", "").split(";")):
    _name, _, _cron = _each.partition("=")
    scheduled(_cron, name=_name)(Beat)
