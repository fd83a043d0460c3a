"""The table of what administrators have ordered, in force or over (E3)."""

from collections.abc import Sequence
from typing import Any

import attr

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import Migrations, Waiting

MOST_IN_FORCE = 1_000
MOST_KEPT = 10_000
KEPT_FOR_MS = 90 * 24 * 3_600_000
PUSHES_APART_MS = 60_000
"""A room is pushed again to a server at most this often."""

_COLUMNS = (
    "action_id, kind, server, room_id, sender, reason, made_by, made_ms, until_ms, ended_by,"
    " ended_ms"
)
_IN_FORCE = "ended_ms IS NULL AND until_ms > ?"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Action:
    """What an administrator has ordered. Times are in ms since the epoch.

    kind: ``hold``, ``exempt``, ``release``, ``discard`` or ``push``.
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


class TooSoonError(Exception):
    """The same was ordered a moment ago, or has yet to be begun."""

    def __init__(self, retry_after_ms: int) -> None:
        super().__init__(retry_after_ms)
        self.retry_after_ms = retry_after_ms


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
        if too many are in force.

        Raises:
            TooSoonError: it is a push of a room to a server that had one within the minute, or that
                has one to be begun.
        """

        def write_txn(txn: Cursor) -> bool:
            now_ms = self._homeserver.now_ms()
            if action.kind == "push":
                self._raise_if_too_soon_txn(txn, action, now_ms)
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

    def _raise_if_too_soon_txn(self, txn: Cursor, push: Action, now_ms: int) -> None:
        txn.execute(
            "SELECT MAX(made_ms) FROM synapse_sticky_actions WHERE until_ms > ? AND kind = 'push'"
            " AND server = ? AND room_id = ? AND (ended_ms IS NULL OR made_ms > ?)",
            (now_ms, push.server, push.room_id, now_ms - PUSHES_APART_MS),
        )
        ((made_ms,),) = txn.fetchall()
        if made_ms is not None:
            left_ms = made_ms + PUSHES_APART_MS - now_ms
            raise TooSoonError(left_ms if 0 < left_ms <= PUSHES_APART_MS else PUSHES_APART_MS)

    async def done(self, action_id: str) -> None:
        """The action was done: it is over, and nobody has ended it."""

        def write_txn(txn: Cursor) -> None:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                "UPDATE synapse_sticky_actions SET ended_ms = ?"
                f" WHERE action_id = ? AND {_IN_FORCE}",
                (now_ms, action_id, now_ms),
            )

        await self._homeserver.transact("action_done", write_txn)

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

    def spared_txn(self, txn: Cursor) -> tuple[set[str], set[str]]:
        """The servers that are held, and those that are exempt."""
        txn.execute(
            f"SELECT kind, server FROM synapse_sticky_actions WHERE {_IN_FORCE}"
            " AND kind IN ('hold', 'exempt') AND server IS NOT NULL",
            (self._homeserver.now_ms(),),
        )
        found: dict[str, set[str]] = {"hold": set(), "exempt": set()}
        for kind, server in txn.fetchall():
            found[kind].add(server)
        return found["hold"], found["exempt"]

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
