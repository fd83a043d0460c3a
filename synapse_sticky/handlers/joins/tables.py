"""The tables of newcomers, and of how far each process has read the state changes."""

import json
from collections.abc import Callable, Collection, Sequence

import attr

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import Migrations, Waiting

FORGET_INSTANCE_AFTER_MS = 2 * 3600 * 1000
"""Joins of an hour ago are of no interest any more."""

_REPLACED = ""
"""No process has this name. Its whitelist is the last one that was replaced: a new process may look
only after the others have stored that of the same restart."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Newcomer:
    """A server that newly joined a room, until it is certain to have what it needs.

    position: the lowest position of the sticky events stream that it may lack.
    watch_until_ms: until then the push also watches for own events that are sent after the join.
    """

    destination: str
    room_id: str
    position: int
    watch_until_ms: int


class NewcomerTable:
    """Newcomers (P3), and positions in the state changes. Every method is one transaction."""

    duty = "joins"
    contents = "newcomers. They are sent what Synapse's own backlog says that they lack"
    waiting: Waiting = None  # Synapse has a part in it: ``homeserver.remaining``
    migrations: Migrations = (
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_newcomers (
                destination TEXT NOT NULL,
                room_id TEXT NOT NULL,
                position BIGINT NOT NULL,
                watch_until_ms BIGINT NOT NULL,
                PRIMARY KEY (destination, room_id)
            )
            """,
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_state_positions (
                instance_name TEXT NOT NULL PRIMARY KEY,
                position BIGINT NOT NULL,
                updated_ts_ms BIGINT NOT NULL
            )
            """,
        ),
        (
            """
            CREATE TABLE IF NOT EXISTS synapse_sticky_whitelists (
                instance_name TEXT NOT NULL PRIMARY KEY,
                allowed TEXT NOT NULL
            )
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    async def state_position(self, now_position: int) -> int:
        """The position from which this process reads the state changes.

        It is the position of the slowest process, as this process may send to destinations that any
        other one sent to before. The very first process starts at ``now_position``.
        """
        instance_name = self._homeserver.instance_name

        def read_txn(txn: Cursor) -> int:
            now_ms = self._homeserver.now_ms()
            txn.execute(
                "DELETE FROM synapse_sticky_state_positions"
                " WHERE updated_ts_ms < ? AND instance_name != ?",
                (now_ms - FORGET_INSTANCE_AFTER_MS, instance_name),
            )
            txn.execute("SELECT instance_name, position FROM synapse_sticky_state_positions")
            known: dict[str, int] = dict(txn.fetchall())
            start = min(known.values(), default=now_position)
            self._write_position_txn(txn, min(start, now_position))
            return min(start, now_position)

        return await self._homeserver.transact("state_position", read_txn)

    def _write_position_txn(self, txn: Cursor, position: int) -> None:
        txn.execute(
            "INSERT INTO synapse_sticky_state_positions"
            " (instance_name, position, updated_ts_ms) VALUES (?, ?, ?)"
            " ON CONFLICT (instance_name) DO UPDATE"
            " SET position = EXCLUDED.position, updated_ts_ms = EXCLUDED.updated_ts_ms",
            (self._homeserver.instance_name, position, self._homeserver.now_ms()),
        )

    async def record_joins(
        self,
        position: int,
        joins: Sequence[tuple[str, str]],
        watch_until_ms: int,
        add_backlog_txn: Callable[[Cursor, Sequence[tuple[str, str]]], None],
    ) -> None:
        """Stores newcomers and up to where the state changes have been read, as one.

        A newcomer lacks everything. It is in Synapse's own backlog as well, so that Synapse goes on
        by itself if the module is taken out.

        Args:
            joins: ``(destination, room_id)`` of each.
            add_backlog_txn: enters destinations and rooms into that backlog, from its start.
        """

        def write_txn(txn: Cursor) -> None:
            _insert_txn(txn, joins, watch_until_ms)
            add_backlog_txn(txn, joins)
            self._write_position_txn(txn, position)

        await self._homeserver.transact("record_joins", write_txn)

    async def record_again(
        self,
        newcomer: tuple[str, str],
        watch_until_ms: int,
        add_backlog_txn: Callable[[Cursor, Sequence[tuple[str, str]]], None],
    ) -> None:
        """Stores a server, which is in the room already, as a newcomer that lacks everything.

        Args:
            newcomer: ``(destination, room_id)``.
            add_backlog_txn: as for ``record_joins``.
        """

        def write_txn(txn: Cursor) -> None:
            _insert_txn(txn, [newcomer], watch_until_ms)
            add_backlog_txn(txn, [newcomer])

        await self._homeserver.transact("record_again", write_txn)

    async def whitelist(self) -> tuple[bool, list[str] | None]:
        """Whether this process has stored a federation whitelist, and the servers that it allowed;
        None if it allowed all.

        For a process that has stored none, as it is new or has another name: the servers that all
        whitelists of the others allowed, those that they had before included. None if there are
        none.
        """

        def read_txn(txn: Cursor) -> dict[str, str]:
            txn.execute("SELECT instance_name, allowed FROM synapse_sticky_whitelists")
            return dict(txn.fetchall())

        stored = await self._homeserver.transact("whitelist", read_txn)
        own = stored.get(self._homeserver.instance_name)
        if own is not None:
            return True, json.loads(own)
        lists = [set(a) for a in map(json.loads, stored.values()) if a is not None]
        return False, sorted(set.intersection(*lists)) if lists else None

    async def store_whitelist(
        self, allowed: Collection[str] | None, replaces: tuple[Collection[str] | None] | None
    ) -> None:
        """Stores the federation whitelist of this start; None if there is none.

        Args:
            replaces: the one that this process has stored before; None if it has stored none.
        """
        rows = [(self._homeserver.instance_name, allowed)]
        if replaces is not None:
            rows.append((_REPLACED, *replaces))
        dumped = [(name, json.dumps(None if a is None else sorted(a))) for name, a in rows]

        def write_txn(txn: Cursor) -> None:
            txn.execute_batch(
                "INSERT INTO synapse_sticky_whitelists (instance_name, allowed) VALUES (?, ?)"
                " ON CONFLICT (instance_name) DO UPDATE SET allowed = EXCLUDED.allowed",
                dumped,
            )

        await self._homeserver.transact("store_whitelist", write_txn)

    async def newcomers(self) -> list[Newcomer]:
        """All newcomers, of every process; a position is never past what is still to be sent."""

        def read_txn(txn: Cursor) -> list[Newcomer]:
            txn.execute(
                "SELECT destination, room_id, position, watch_until_ms"
                " FROM synapse_sticky_newcomers"
            )
            return [Newcomer(*row) for row in txn.fetchall()]

        return await self._homeserver.transact("newcomers", read_txn)

    async def forget_room(self, room_id: str) -> None:
        """Deletes the newcomers of a room that is gone. Synapse deletes its own backlog of it."""

        def write_txn(txn: Cursor) -> None:
            txn.execute("DELETE FROM synapse_sticky_newcomers WHERE room_id = ?", (room_id,))

        await self._homeserver.transact("forget_room", write_txn)

    async def settle(
        self,
        newcomer: Newcomer,
        *,
        still_watched: bool,
        clear_backlog_txn: Callable[[Cursor, str, str], None],
    ) -> None:
        """The newcomer lacks nothing of the room before its position, and nothing is due.

        One that is still watched stays a newcomer. One with another ``watch_until_ms`` has joined
        anew meanwhile and is left alone.

        Args:
            clear_backlog_txn: removes a destination and room from Synapse's own backlog.
        """

        def write_txn(txn: Cursor) -> None:
            key = (newcomer.destination, newcomer.room_id, newcomer.watch_until_ms)
            if still_watched:
                txn.execute(
                    "UPDATE synapse_sticky_newcomers SET position = ?"
                    " WHERE destination = ? AND room_id = ? AND watch_until_ms = ?",
                    (newcomer.position, *key),
                )
            else:
                txn.execute(
                    "DELETE FROM synapse_sticky_newcomers"
                    " WHERE destination = ? AND room_id = ? AND watch_until_ms = ?",
                    key,
                )
            txn.execute(
                "SELECT 1 FROM synapse_sticky_newcomers"
                " WHERE destination = ? AND room_id = ? AND watch_until_ms != ?",
                key,
            )
            if txn.fetchone() is None:
                clear_backlog_txn(txn, newcomer.destination, newcomer.room_id)

        await self._homeserver.transact("settle", write_txn)


def _insert_txn(txn: Cursor, joins: Sequence[tuple[str, str]], watch_until_ms: int) -> None:
    txn.execute_batch(
        "INSERT INTO synapse_sticky_newcomers"
        " (destination, room_id, position, watch_until_ms) VALUES (?, ?, 0, ?)"
        " ON CONFLICT (destination, room_id)"
        " DO UPDATE SET position = 0, watch_until_ms = EXCLUDED.watch_until_ms",
        [(*join, watch_until_ms) for join in joins],
    )
