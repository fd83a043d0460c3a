"""The table of what administrators have ordered, in force or over (E3)."""

from collections.abc import Sequence
from typing import Any

import attr

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import Migrations, Waiting

MOST_IN_FORCE = 1_000
MOST_KEPT = 10_000
KEPT_FOR_MS = 90 * 24 * 3_600_000

_COLUMNS = (
    "action_id, kind, server, room_id, sender, reason, made_by, made_ms, until_ms, ended_by,"
    " ended_ms"
)
_IN_FORCE = "ended_ms IS NULL AND until_ms > ?"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Action:
    """What an administrator has ordered. Times are in ms since the epoch.

    kind: ``hold``, ``exempt``, ``release`` or ``discard``.
    until_ms: then it is over by itself.
    ended_by: who ended it before; None if nobody did.
    """

    action_id: str
    kind: str
    server: str | None
    room_id: str | None
    sender: str | None
    reason: str
    made_by: str
    made_ms: int
    until_ms: int
    ended_by: str | None = None
    ended_ms: int | None = None


class ActionTable:
    """Every method is one transaction, but for those that end in ``_txn``."""

    duty = "admin"
    layout = 1
    contents = ""  # no version before had it
    waiting: Waiting = None  # without the module, nothing is held and nobody is exempt
    migrations: Migrations = (
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_actions (
                action_id TEXT NOT NULL PRIMARY KEY,
                kind TEXT NOT NULL,
                server TEXT,
                room_id TEXT,
                sender TEXT,
                reason TEXT NOT NULL,
                made_by TEXT NOT NULL,
                made_ms BIGINT NOT NULL,
                until_ms BIGINT NOT NULL,
                ended_by TEXT,
                ended_ms BIGINT
            )
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_actions_until
                ON synapse_sticky_actions (until_ms)
            """,
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_actions_made
                ON synapse_sticky_actions (made_ms, action_id)
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    async def in_force(self) -> list[Action]:
        """All that are in force, those made first in front."""

        def read_txn(txn: Cursor) -> list[Action]:
            txn.execute(
                f"SELECT {_COLUMNS} FROM synapse_sticky_actions WHERE {_IN_FORCE}"
                " ORDER BY made_ms, action_id LIMIT ?",
                (self._homeserver.now_ms(), 2 * MOST_IN_FORCE),
            )
            return [Action(*row) for row in txn.fetchall()]

        return await self._homeserver.transact_briefly("read_actions", read_txn)

    async def add(self, action: Action) -> bool:
        """Adds an action, and deletes those that are over for long. Gives False, and adds nothing,
        if too many are in force."""

        def write_txn(txn: Cursor) -> bool:
            now_ms = self._homeserver.now_ms()
            txn.execute(f"SELECT COUNT(*) FROM synapse_sticky_actions WHERE {_IN_FORCE}", (now_ms,))
            ((count,),) = txn.fetchall()
            if count >= MOST_IN_FORCE:
                return False
            txn.execute(
                f"INSERT INTO synapse_sticky_actions ({_COLUMNS})"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                attr.astuple(action),
            )
            txn.execute(
                "DELETE FROM synapse_sticky_actions WHERE until_ms < ?", (now_ms - KEPT_FOR_MS,)
            )
            txn.execute(
                "DELETE FROM synapse_sticky_actions WHERE action_id IN ("
                "SELECT action_id FROM synapse_sticky_actions WHERE until_ms < ?"
                " ORDER BY made_ms DESC LIMIT ? OFFSET ?)",
                (now_ms, MOST_IN_FORCE, MOST_KEPT),
            )
            return True

        return await self._homeserver.transact("add_action", write_txn)

    async def end(self, action_id: str, admin: str) -> tuple[Action, bool] | None:
        """Ends an action, if it is in force. Gives it as it is then, and whether it was; None if
        there is none of this ID."""

        def write_txn(txn: Cursor) -> tuple[Action, bool] | None:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                f"SELECT 1 FROM synapse_sticky_actions WHERE action_id = ? AND {_IN_FORCE}",
                (action_id, now_ms),
            )
            was_in_force = txn.fetchone() is not None
            txn.execute(
                "UPDATE synapse_sticky_actions SET ended_by = ?, ended_ms = ?"
                f" WHERE action_id = ? AND {_IN_FORCE}",
                (admin, now_ms, action_id, now_ms),
            )
            txn.execute(
                f"SELECT {_COLUMNS} FROM synapse_sticky_actions WHERE action_id = ?", (action_id,)
            )
            row = txn.fetchone()
            return None if row is None else (Action(*row), was_in_force)

        return await self._homeserver.transact("end_action", write_txn)

    async def page(self, before: tuple[int, str] | None, limit: int) -> Sequence[Action]:
        """Actions, in force or over, those made last in front: from the one made before ``before``
        (its time and ID) on."""

        def read_txn(txn: Cursor) -> list[Action]:
            where, args = "", list[Any]()
            if before is not None:
                where = "WHERE made_ms < ? OR (made_ms = ? AND action_id < ?)"
                args = [before[0], *before]
            txn.execute(
                f"SELECT {_COLUMNS} FROM synapse_sticky_actions {where}"
                " ORDER BY made_ms DESC, action_id DESC LIMIT ?",
                (*args, limit),
            )
            return [Action(*row) for row in txn.fetchall()]

        return await self._homeserver.transact("list_actions", read_txn)

    def held_until_txn(self, txn: Cursor, server: str) -> int | None:
        """Until when the server is held; None if it is not."""
        txn.execute(
            f"SELECT MAX(until_ms) FROM synapse_sticky_actions WHERE {_IN_FORCE}"
            " AND kind = 'hold' AND server = ?",
            (self._homeserver.now_ms(), server),
        )
        row = txn.fetchone()
        return row[0] if row else None

    def spared_txn(self, txn: Cursor) -> set[str]:
        """The servers that are held or exempt: however many of their events wait, their
        transactions are not refused for that."""
        txn.execute(
            f"SELECT server FROM synapse_sticky_actions WHERE {_IN_FORCE}"
            " AND kind IN ('hold', 'exempt') AND server IS NOT NULL",
            (self._homeserver.now_ms(),),
        )
        return {server for (server,) in txn.fetchall()}

    def discarded_txn(
        self, txn: Cursor, room_id: str, sender: str, since_ms: int
    ) -> tuple[str, int] | None:
        """Who has discarded what waited of the sender in the room since this time, and when; None
        if nobody has."""
        txn.execute(
            "SELECT made_by, made_ms FROM synapse_sticky_actions WHERE made_ms >= ?"
            " AND kind = 'discard' AND (server IS NULL OR server = ?)"
            " AND (room_id IS NULL OR room_id = ?) AND (sender IS NULL OR sender = ?)"
            " ORDER BY made_ms LIMIT 1",
            (since_ms, sender.partition(":")[2], room_id, sender),
        )
        row = txn.fetchone()
        return None if row is None else (row[0], row[1])

    def counts_txn(self, txn: Cursor, at_most: int) -> dict[str, Any]:
        """How many are in force."""
        txn.execute(
            "SELECT COUNT(*) FROM"
            f" (SELECT 1 FROM synapse_sticky_actions WHERE {_IN_FORCE} LIMIT ?) AS few",
            (self._homeserver.now_ms(), at_most),
        )
        ((count,),) = txn.fetchall()
        return {"actions": {"in_force": count}}
