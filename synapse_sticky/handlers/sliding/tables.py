"""What a response of sliding sync had no room for, by the token that went out with it."""

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import Migrations, Waiting

_FORGET_AFTER_MS = 3600 * 1000
"""What was older than a page has expired by then."""

Connection = tuple[str, str, str]
"""Whose it is: user ID, device ID, and the client's name for the connection."""


class PageTable:
    """The pages that are not the last ones, and what is left after each."""

    duty = "sliding"
    contents = "pages of sliding sync. Who just reads a room's older events gets no more of them"
    waiting: Waiting = None
    migrations: Migrations = (
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_pages (
                user_id TEXT NOT NULL,
                device_id TEXT NOT NULL,
                connection TEXT NOT NULL,
                token TEXT NOT NULL,
                older TEXT NOT NULL,
                noted_ts_ms BIGINT NOT NULL,
                PRIMARY KEY (user_id, device_id, connection, token)
            )
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_pages_noted_ts
                ON synapse_sticky_pages (noted_ts_ms)
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    async def store(self, connection: Connection, token: str, older: str) -> None:
        """Stores what is still to be read when the connection's client comes with this token."""

        def write_txn(txn: Cursor) -> None:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                "DELETE FROM synapse_sticky_pages WHERE noted_ts_ms < ?",
                (now_ms - _FORGET_AFTER_MS,),
            )
            txn.execute(
                "INSERT INTO synapse_sticky_pages"
                " (user_id, device_id, connection, token, older, noted_ts_ms)"
                " VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (user_id, device_id, connection, token)"
                " DO UPDATE SET older = EXCLUDED.older, noted_ts_ms = EXCLUDED.noted_ts_ms",
                (*connection, token, older, now_ms),
            )

        await self._homeserver.transact("store_page", write_txn)

    async def read(self, connection: Connection, token: str) -> str | None:
        """What was stored; None if nothing was, or too long ago."""

        def read_txn(txn: Cursor) -> str | None:
            txn.execute(
                "SELECT older FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ? AND connection = ? AND token = ?",
                (*connection, token),
            )
            row = txn.fetchone()
            return row[0] if row else None

        return await self._homeserver.transact("read_page", read_txn)
