"""What the responses of sliding sync stood for, by the token that went out with each."""

from synapse_sticky.handlers.sliding.pages import (
    Page,
    dumped,
    dumped_older,
    dumped_shown,
    loaded,
    loaded_older,
    loaded_shown,
)
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import Migrations, Waiting
from synapse_sticky.index import Position

_FORGET_AFTER_MS = 65 * 60 * 1000
"""What was older than a page has expired by then. Nor does anybody ask any more which joins it took
into account: only those within the hour count, by whichever process's clock."""

_MOST_READ = 100
"""Of one device's pages."""

_MOST_KEPT = 1_000
"""Of one device's pages: its client chooses how many connections it begins."""

Connection = tuple[str, str, str]
"""Whose it is: user ID, device ID, and the client's name for the connection."""


class PageTable:
    """The pages that others follow, and those that took a new room into account."""

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
        (
            "ALTER TABLE synapse_sticky_pages ADD COLUMN IF NOT EXISTS shown TEXT",
            "ALTER TABLE synapse_sticky_pages ADD COLUMN IF NOT EXISTS until TEXT",
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    async def store(self, connection: Connection, token: Position, page: Page) -> None:
        """Stores what counts when the connection's client comes with this token. Of one device's
        pages the latest are kept."""
        shown = None if page.shown is None else dumped_shown(page.shown)
        until = None if page.until is None else dumped(page.until)

        def write_txn(txn: Cursor) -> None:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                "DELETE FROM synapse_sticky_pages WHERE noted_ts_ms < ?",
                (now_ms - _FORGET_AFTER_MS,),
            )
            txn.execute(
                "INSERT INTO synapse_sticky_pages"
                " (user_id, device_id, connection, token, older, noted_ts_ms, shown, until)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (user_id, device_id, connection, token)"
                " DO UPDATE SET older = EXCLUDED.older, noted_ts_ms = EXCLUDED.noted_ts_ms,"
                " shown = EXCLUDED.shown, until = EXCLUDED.until",
                (*connection, dumped(token), dumped_older(page.older), now_ms, shown, until),
            )
            device = connection[:2]
            txn.execute(
                "DELETE FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ? AND noted_ts_ms <"
                " (SELECT noted_ts_ms FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ?"
                " ORDER BY noted_ts_ms DESC LIMIT 1 OFFSET ?)",
                (*device, *device, _MOST_KEPT - 1),
            )

        await self._homeserver.transact("store_page", write_txn)

    async def read(self, connection: Connection, token: Position) -> Page | None:
        """What was stored; None if nothing was, or too long ago.

        A connection that the client has begun anew may have another name: then it is what was
        stored of another one of the device.
        """
        user_id, device_id, name = connection

        def read_txn(txn: Cursor) -> Page | None:
            txn.execute(
                "SELECT older, shown, until FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ? AND token = ?"
                " ORDER BY CASE WHEN connection = ? THEN 0 ELSE 1 END, noted_ts_ms LIMIT 1",
                (user_id, device_id, dumped(token), name),
            )
            row = txn.fetchone()
            return _page_of(*row) if row else None

        return await self._homeserver.transact("read_page", read_txn)

    async def latest(self, connection: Connection) -> list[Page]:
        """The latest pages of the connection's device that say which rooms they took into account,
        the last one first."""
        user_id, device_id, _ = connection

        def read_txn(txn: Cursor) -> list[Page]:
            txn.execute(
                "SELECT shown, until FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ? AND shown IS NOT NULL"
                " ORDER BY noted_ts_ms DESC LIMIT ?",
                (user_id, device_id, _MOST_READ),
            )
            return [_page_of("[]", *row) for row in txn.fetchall()]

        return await self._homeserver.transact("read_pages", read_txn)


def _page_of(older: str, shown: str | None, until: str | None) -> Page:
    return Page(
        loaded_older(older),
        None if shown is None else loaded_shown(shown),
        None if until is None else loaded(until),
    )
