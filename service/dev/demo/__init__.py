"""`make demo`: kills workers, relays and the broker while orders come in, and counts what was lost or done twice."""

from service.dev.demo.example import try_it
from service.dev.demo.script import run

__all__ = ["run", "try_it"]
