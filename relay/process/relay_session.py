"""The relay's sessions on PostgreSQL.

What must stay true: they are made directly or through a pooler in session mode, and no wait on them is unbounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from relay.process.wakeup import LONGEST_SLEEP
from service.database.driver import open_connection
from service.errors import ConfigurationError

if TYPE_CHECKING:
    from relay.process.wakeup import Wakeup
    from service.database.driver import Connection
    from service.settings import DatabaseSettings

SESSION = {
    "plan_cache_mode": "force_custom_plan",
    "jit": "off",
    # Rows come in the index's order, whatever the statistics say: any other plan sorts the backlog for each batch.
    "enable_sort": "off",
    # Ends the session of a relay that is stopped or gone while it holds the sleeper's lock.
    "idle_session_timeout": f"{int(LONGEST_SLEEP * 4)}s",
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
"""Settings of a session that hands deliveries over, for `bound_waits`."""


class Sessions:
    """Opens sessions, and remembers whether one was ever told of a notification."""

    def __init__(self, settings: DatabaseSettings) -> None:
        self._settings = settings.model_copy(update={"pooler": False})
        self._was_told = False
        self._opened: WeakSet[Connection] = WeakSet()

    async def connect(self, name: str = "outbox-relay") -> Connection:
        """A new session, shown in `pg_stat_activity` under this name."""
        connection = await open_connection(self._settings, name)
        self._opened.add(connection)
        return connection

    def cut(self) -> None:
        """End them all without asking PostgreSQL, which rolls back. Whoever waits for one of them gets an error."""
        for connection in self._opened:
            connection.terminate()

    async def prove(self, wakeup: Wakeup) -> None:
        """Make sure that notifications arrive.

        Raises:
            ConfigurationError: when they never did. Where they once did, it is no wrong setting when they do not.
        """
        notifier = await self.connect()
        try:
            await wakeup.open(notifier)
        except ConfigurationError as error:
            if self._was_told:
                raise ConnectionError("notifications do not arrive any more") from error
            raise
        finally:
            await notifier.close(timeout=2)
        self._was_told = True
