"""What the processes under attack do to themselves: their dice, and the file in which each strike is noted first.

What must stay true: a strike stands in the file before it happens, because only that tells the suite which death it
caused and which the product did. The dice fall the same way for the same seed, process, start and number of child.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time

__all__ = ["dice", "record"]

_dice: dict[int, random.Random] = {}


def dice() -> random.Random:
    """This process's own."""
    pid = os.getpid()
    if pid not in _dice:
        which = (os.environ.get(name, "") for name in ("CHAOS_SEED", "CHAOS_NAME", "CHAOS_START"))
        _dice[pid] = random.Random(" ".join((*which, multiprocessing.current_process().name)))
    return _dice[pid]


def record(gap: str, action: str) -> None:
    """Write down what is about to be done to this process."""
    which = {"name": os.environ["CHAOS_NAME"], "start": int(os.environ["CHAOS_START"]), "pid": os.getpid()}
    line = json.dumps({"at": time.time(), **which, "gap": gap, "action": action})
    with open(os.environ["CHAOS_STRIKES"], "a") as file:  # noqa: PTH123  one short write, whole or not at all
        file.write(line + "\n")
