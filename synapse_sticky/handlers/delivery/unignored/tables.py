"""Whom local users have stopped ignoring within the hour."""

from collections.abc import Collection

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.layout import Migrations, Waiting

_FORGET_AFTER_MS = 65 * 60 * 1000
"""Whatever was kept back has expired by then, by whichever process's clock."""

MOST_OF_A_USER = 1_000
"""A local user ignores as many names as they like, and takes them back."""


class UnignoredTable:
    """A row for each user whom a local user ignored, and does not ignore now."""

    duty = "delivery (unignored)"
    contents = ""
    waiting: Waiting = None
    migrations: Migrations = (
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_unignored (
                user_id TEXT NOT NULL,
                sender TEXT NOT NULL,
                position BIGINT NOT NULL,
                noted_ts_ms BIGINT NOT NULL,
                PRIMARY KEY (user_id, sender)
            )
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_unignored_noted_ts
                ON synapse_sticky_unignored (noted_ts_ms)
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    def note_txn(
        self,
        txn: Cursor,
        user_id: str,
        position: int,
        *,
        ignored: Collection[str],
        unignored: Collection[str],
    ) -> None:
        """Notes that the user ignores some others from this position of the account data on, and
        some not any more; in Synapse's own transaction. Of very many it notes only some."""
        for portion in portions(ignored):
            clause, args = self._homeserver.in_list("sender", portion)
            txn.execute(
                f"DELETE FROM synapse_sticky_unignored WHERE user_id = ? AND {clause}",
                (user_id, *args),
            )
        if not unignored:
            return
        now_ms = self._homeserver.now_ms()
        txn.execute_batch(
            "INSERT INTO synapse_sticky_unignored (user_id, sender, position, noted_ts_ms)"
            " VALUES (?, ?, ?, ?) ON CONFLICT (user_id, sender)"
            " DO UPDATE SET position = EXCLUDED.position, noted_ts_ms = EXCLUDED.noted_ts_ms",
            [(user_id, sender, position, now_ms) for sender in sorted(unignored)[:MOST_OF_A_USER]],
        )
        txn.execute(
            "DELETE FROM synapse_sticky_unignored WHERE user_id = ? AND sender NOT IN ("
            " SELECT sender FROM synapse_sticky_unignored WHERE user_id = ?"
            " ORDER BY position DESC, sender LIMIT ?)",
            (user_id, user_id, MOST_OF_A_USER),
        )

    async def senders(self, user_id: str, after: int, up_to: int) -> set[str]:
        """Whom the user stopped ignoring between these positions of the account data, the second
        one included, and within the hour."""

        def read_txn(txn: Cursor) -> set[str]:
            txn.execute(
                "SELECT sender FROM synapse_sticky_unignored"
                " WHERE user_id = ? AND ? < position AND position <= ? AND ? <= noted_ts_ms",
                (user_id, after, up_to, self._homeserver.now_ms() - _FORGET_AFTER_MS),
            )
            return {sender for (sender,) in txn.fetchall()}

        return await self._homeserver.transact("unignored", read_txn)

    async def forget(self) -> None:
        """Deletes what nobody asks for any more."""

        def delete_txn(txn: Cursor) -> None:
            txn.execute(
                "DELETE FROM synapse_sticky_unignored WHERE noted_ts_ms < ?",
                (self._homeserver.now_ms() - _FORGET_AFTER_MS,),
            )

        await self._homeserver.transact("forget_unignored", delete_txn)
