"""The module's own tables, and their migrations.

Sticky events, the stream and the backlog stay in Synapse's tables. Here is only what Synapse has
no place for: who is a newcomer, how far each process has read the state changes, which events wait
for their release, what a response of sliding sync had no room for, and which PDUs could not
be persisted yet.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence

import attr

from synapse_sticky.homeserver import (
    Cursor,
    Federation,
    Homeserver,
    IncompletePdu,
    NewStickyEvent,
    ServerJoin,
)

logger = logging.getLogger(__name__)

_MIGRATIONS: tuple[tuple[str, ...], ...] = (
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
        CREATE TABLE IF NOT EXISTS synapse_sticky_deferred (
            event_id TEXT NOT NULL PRIMARY KEY,
            room_id TEXT NOT NULL,
            sender TEXT NOT NULL,
            server TEXT NOT NULL,
            expires_at_ms BIGINT NOT NULL,
            event_stream_ordering BIGINT NOT NULL
        )
        """,
        """
        CREATE INDEX IF NOT EXISTS synapse_sticky_deferred_server
            ON synapse_sticky_deferred (server)
        """,
    ),
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
        """
        CREATE TABLE IF NOT EXISTS synapse_sticky_incomplete (
            origin TEXT NOT NULL,
            event_id TEXT NOT NULL,
            room_id TEXT NOT NULL,
            event_json TEXT NOT NULL,
            internal_metadata TEXT NOT NULL,
            prev_event_ids TEXT NOT NULL,
            received_ts_ms BIGINT NOT NULL,
            until_ms BIGINT NOT NULL,
            due_ms BIGINT NOT NULL,
            PRIMARY KEY (origin, event_id)
        )
        """,
        """
        CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_due
            ON synapse_sticky_incomplete (due_ms)
        """,
        """
        CREATE INDEX IF NOT EXISTS synapse_sticky_incomplete_room
            ON synapse_sticky_incomplete (origin, room_id, received_ts_ms)
        """,
    ),
)
"""One entry a version of the layout; entries are only ever added, and processes of the version
before go on working with the tables of the next until they are restarted."""

_FORGET_INSTANCE_AFTER_MS = 2 * 3600 * 1000
"""Joins of an hour ago are of no interest any more."""

_FORGET_PAGE_AFTER_MS = 3600 * 1000
"""What was older than a page is expired by then."""

_PAGE = 500

_INCOMPLETE = "origin, event_id, room_id, event_json, internal_metadata, prev_event_ids"
_MAX_INCOMPLETE_OF_SERVER = 500
_MAX_INCOMPLETE = 5_000
_ROOMS_AT_ONCE = 50

_DEFERRED = "event_id, room_id, sender, expires_at_ms, event_stream_ordering"


class NewerLayoutError(Exception):
    """The tables were made by a later version of the module."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Newcomer:
    """A server that newly joined a room, until it is certain to have what it needs.

    ``position`` is the lowest position of the sticky events stream that it may lack;
    until ``watch_until_ms`` own events that are sent meanwhile are watched for, too.
    """

    destination: str
    room_id: str
    position: int
    watch_until_ms: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class WaitingPdu:
    """A PDU that could not be persisted yet: sticky until ``until_ms``, looked at at ``due_ms``."""

    event_id: str
    prev_event_ids: tuple[str, ...]
    received_ts_ms: int
    until_ms: int
    due_ms: int


class Storage:
    """The module's tables. Every method is one transaction."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._hs = homeserver
        self._federation: Federation = homeserver.federation

    async def migrate(self) -> None:
        """Brings the tables to this version's layout; any number of processes may try at once.

        Raises:
            NewerLayoutError: a later version of the module has been here.
        """
        await self._hs.transact_alone("migrate", self._migrate_txn)

    def _migrate_txn(self, txn: Cursor) -> None:
        txn.execute("CREATE TABLE IF NOT EXISTS synapse_sticky_layout (version BIGINT NOT NULL)")
        txn.execute("SELECT MAX(version) FROM synapse_sticky_layout")
        row = txn.fetchone()
        version = (row[0] if row else None) or 0
        if version > len(_MIGRATIONS):
            raise NewerLayoutError(
                f"The tables synapse_sticky_* have layout {version}, this version of "
                f"synapse-sticky knows {len(_MIGRATIONS)}. Install the later version again."
            )
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            logger.info("Migrating the tables synapse_sticky_* to layout %d", number)
            for statement in statements:
                txn.execute(statement)
            txn.execute("INSERT INTO synapse_sticky_layout (version) VALUES (?)", (number,))

    async def state_position(self, instance_name: str, now_position: int) -> int:
        """Up to where the instance has read the state changes.

        It is where the slowest of all instances was: destinations may have moved to it from any of
        them. The first of all starts at ``now_position``.
        """

        def read_txn(txn: Cursor) -> int:
            now_ms = self._hs.now_ms()
            txn.execute(
                "DELETE FROM synapse_sticky_state_positions"
                " WHERE updated_ts_ms < ? AND instance_name != ?",
                (now_ms - _FORGET_INSTANCE_AFTER_MS, instance_name),
            )
            txn.execute("SELECT instance_name, position FROM synapse_sticky_state_positions")
            known: dict[str, int] = dict(txn.fetchall())
            start = min(known.values(), default=now_position)
            self._write_position_txn(txn, instance_name, min(start, now_position))
            return min(start, now_position)

        return await self._hs.transact("state_position", read_txn)

    def _write_position_txn(self, txn: Cursor, instance_name: str, position: int) -> None:
        txn.execute(
            "INSERT INTO synapse_sticky_state_positions"
            " (instance_name, position, updated_ts_ms) VALUES (?, ?, ?)"
            " ON CONFLICT (instance_name) DO UPDATE"
            " SET position = EXCLUDED.position, updated_ts_ms = EXCLUDED.updated_ts_ms",
            (instance_name, position, self._hs.now_ms()),
        )

    async def record_joins(
        self, instance_name: str, position: int, joins: list[ServerJoin], watch_until_ms: int
    ) -> None:
        """Notes the newcomers and up to where the state changes have been read, as one.

        Each newcomer lacks everything. It is in Synapse's own backlog as well, so that Synapse
        goes on by itself if the module is taken out.
        """

        def write_txn(txn: Cursor) -> None:
            for join in joins:
                txn.execute(
                    "INSERT INTO synapse_sticky_newcomers"
                    " (destination, room_id, position, watch_until_ms) VALUES (?, ?, 0, ?)"
                    " ON CONFLICT (destination, room_id)"
                    " DO UPDATE SET position = 0, watch_until_ms = EXCLUDED.watch_until_ms",
                    (join.destination, join.room_id, watch_until_ms),
                )
                self._federation.lower_backlog_txn(txn, join.destination, join.room_id, 0)
            self._write_position_txn(txn, instance_name, position)

        await self._hs.transact("record_joins", write_txn)

    async def newcomers(self) -> list[Newcomer]:
        """All newcomers, of every process; a position is never past what is still to be sent."""

        def read_txn(txn: Cursor) -> list[Newcomer]:
            txn.execute(
                "SELECT destination, room_id, position, watch_until_ms"
                " FROM synapse_sticky_newcomers"
            )
            return [Newcomer(*row) for row in txn.fetchall()]

        return await self._hs.transact("newcomers", read_txn)

    async def backlog(self, destination: str) -> list[tuple[str, int]]:
        """Synapse's own note of what a destination lacks: ``(room_id, position)``."""
        return await self._hs.transact("backlog", self._federation.backlog_txn, destination)

    async def settle(
        self,
        destination: str,
        room_id: str,
        position: int,
        *,
        watch_until_ms: int,
        still_watched: bool,
    ) -> None:
        """The destination lacks nothing of the room before ``position`` and nothing is due.

        A newcomer that is still watched stays one. One with another ``watch_until_ms`` has joined
        anew meanwhile and is left alone.
        """

        def write_txn(txn: Cursor) -> None:
            key = (destination, room_id, watch_until_ms)
            if still_watched:
                txn.execute(
                    "UPDATE synapse_sticky_newcomers SET position = ?"
                    " WHERE destination = ? AND room_id = ? AND watch_until_ms = ?",
                    (position, *key),
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
                self._federation.clear_backlog_txn(txn, destination, room_id, 0)

        await self._hs.transact("settle", write_txn)

    # Deferred events

    def defer_txn(self, txn: Cursor, events: Sequence[tuple[NewStickyEvent, str]]) -> None:
        """Has the events wait, each with its sender's server; within somebody else's transaction,
        which may be tried again."""
        txn.execute_batch(
            f"INSERT INTO synapse_sticky_deferred ({_DEFERRED}, server)"
            " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING",
            [
                (
                    event.event_id,
                    event.room_id,
                    event.sender,
                    event.expires_at_ms,
                    event.event_stream_ordering,
                    server,
                )
                for event, server in events
            ],
        )

    async def deferred(self, after_event_id: str) -> list[tuple[NewStickyEvent, str]]:
        """A page of the events that wait and their senders' servers, by event ID; empty at the
        end."""

        def read_txn(txn: Cursor) -> list[tuple[NewStickyEvent, str]]:
            txn.execute(
                f"SELECT {_DEFERRED}, server FROM synapse_sticky_deferred"
                " WHERE event_id > ? ORDER BY event_id LIMIT ?",
                (after_event_id, _PAGE),
            )
            return [(NewStickyEvent(*row[:-1]), row[-1]) for row in txn.fetchall()]

        return await self._hs.transact("deferred", read_txn)

    async def release(self, event_ids: Sequence[str], still_sticky: Collection[str]) -> list[str]:
        """Enters into the stream, in this order, those of the events that wait, are still sticky
        and unexpired; none of them waits any more. Gives the rooms that have something new."""

        def write_txn(txn: Cursor) -> list[str]:
            listed = _listed(event_ids)
            txn.execute(
                f"SELECT {_DEFERRED} FROM synapse_sticky_deferred"
                f" WHERE event_id IN {listed} AND expires_at_ms > ?",
                (*event_ids, self._hs.now_ms()),
            )
            waiting = {row[0]: NewStickyEvent(*row) for row in txn.fetchall()}
            txn.execute(
                f"DELETE FROM synapse_sticky_deferred WHERE event_id IN {listed}",
                tuple(event_ids),
            )
            released = [waiting[e] for e in event_ids if e in waiting and e in still_sticky]
            self._hs.writer.enter_txn(txn, released)
            return list({event.room_id: None for event in released})

        return await self._hs.transact("release", write_txn)

    async def drop_deferred(self, event_ids: Sequence[str]) -> None:
        """These events wait no longer, and are not released either."""

        def write_txn(txn: Cursor) -> None:
            txn.execute(
                f"DELETE FROM synapse_sticky_deferred WHERE event_id IN {_listed(event_ids)}",
                tuple(event_ids),
            )

        await self._hs.transact("drop_deferred", write_txn)

    async def waiting(self, server: str, at_most: int) -> int:
        """How many events of the server wait to be released, or for Synapse to take them in.

        Up to ``at_most`` the answer may be too large: then it says no more than that there are
        not more.
        """

        def read_txn(txn: Cursor) -> int:
            txn.execute(
                "SELECT COUNT(*) FROM synapse_sticky_deferred"
                " WHERE server = ? AND expires_at_ms > ?",
                (server, self._hs.now_ms()),
            )
            row = txn.fetchone()
            deferred = int(row[0]) if row else 0
            if deferred > at_most:
                return deferred
            return deferred + self._hs.inbound.staged_txn(txn, server, at_most - deferred)

        return await self._hs.transact("waiting", read_txn)

    # PDUs that could not be persisted yet

    async def set_aside(self, pdu: IncompletePdu, until_ms: int, due_ms: int) -> bool:
        """Keeps a PDU that was acknowledged, and that Synapse drops. False if too many are kept.

        Where all places are taken, the server with the most PDUs loses its last.
        """

        def write_txn(txn: Cursor) -> bool:
            key = (pdu.origin, pdu.event_id)
            where = "synapse_sticky_incomplete WHERE origin = ? AND event_id = ?"
            txn.execute(f"SELECT 1 FROM {where}", key)
            if txn.fetchone() is not None:
                return True
            txn.execute(
                "SELECT origin, COUNT(*) FROM synapse_sticky_incomplete"
                " GROUP BY origin ORDER BY COUNT(*) DESC, origin"
            )
            counts: dict[str, int] = dict(txn.fetchall())
            own = counts.get(pdu.origin, 0)
            if own >= _MAX_INCOMPLETE_OF_SERVER:
                return False
            if sum(counts.values()) >= _MAX_INCOMPLETE:
                most, count = next(iter(counts.items()))
                if count <= own + 1:
                    return False
                txn.execute(
                    "SELECT origin, event_id FROM synapse_sticky_incomplete WHERE origin = ?"
                    " ORDER BY received_ts_ms DESC LIMIT 1",
                    (most,),
                )
                txn.execute(f"DELETE FROM {where}", txn.fetchone())
            txn.execute(
                "INSERT INTO synapse_sticky_incomplete"
                f" ({_INCOMPLETE}, received_ts_ms, until_ms, due_ms)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (origin, event_id) DO NOTHING",
                (
                    *(*key, pdu.room_id, pdu.event_json, pdu.internal_metadata),
                    *(json.dumps(pdu.prev_event_ids), self._hs.now_ms(), until_ms, due_ms),
                ),
            )
            return True

        return await self._hs.transact("set_aside", write_txn)

    async def due_incomplete(self) -> list[tuple[str, str]]:
        """Of whom, and for which room, there are PDUs that are due: ``(origin, room_id)``."""

        def read_txn(txn: Cursor) -> list[tuple[str, str]]:
            txn.execute(
                "SELECT origin, room_id FROM synapse_sticky_incomplete WHERE due_ms <= ?"
                " GROUP BY origin, room_id ORDER BY MIN(due_ms) LIMIT ?",
                (self._hs.now_ms(), _ROOMS_AT_ONCE),
            )
            return [(origin, room_id) for origin, room_id in txn.fetchall()]

        return await self._hs.transact("due_incomplete", read_txn)

    async def postpone_incomplete(self, origin: str, room_id: str, by_ms: int) -> None:
        """These PDUs are looked at so much later; those that are expired are forgotten."""

        def write_txn(txn: Cursor) -> None:
            where = "WHERE origin = ? AND room_id = ?"
            now_ms = self._hs.now_ms()
            txn.execute(
                f"DELETE FROM synapse_sticky_incomplete {where} AND until_ms <= ?",
                (origin, room_id, now_ms),
            )
            txn.execute(
                f"UPDATE synapse_sticky_incomplete SET due_ms = ? {where}",
                (now_ms + by_ms, origin, room_id),
            )

        await self._hs.transact("postpone_incomplete", write_txn)

    async def next_incomplete_ms(self) -> int | None:
        """When the next is due; None if there is none."""

        def read_txn(txn: Cursor) -> int | None:
            txn.execute("SELECT MIN(due_ms) FROM synapse_sticky_incomplete")
            row = txn.fetchone()
            return row[0] if row else None

        return await self._hs.transact("next_incomplete_ms", read_txn)

    async def incomplete(self, origin: str, room_id: str) -> list[WaitingPdu]:
        """The PDUs of the server for the room, those received first in front."""

        def read_txn(txn: Cursor) -> list[WaitingPdu]:
            txn.execute(
                "SELECT event_id, prev_event_ids, received_ts_ms, until_ms, due_ms"
                " FROM synapse_sticky_incomplete WHERE origin = ? AND room_id = ?"
                " ORDER BY received_ts_ms, event_id",
                (origin, room_id),
            )
            return [
                WaitingPdu(event_id, tuple(json.loads(prev_event_ids)), *times)
                for event_id, prev_event_ids, *times in txn.fetchall()
            ]

        return await self._hs.transact("incomplete", read_txn)

    async def stage_again(
        self,
        origin: str,
        room_id: str,
        event_ids: Sequence[str],
        *,
        over: Sequence[str],
        due: Mapping[str, int],
    ) -> None:
        """Has these PDUs processed once more, in this order; forgets those that are over, and sets
        when others are looked at next. What is staged is kept here, in case it fails again."""

        def write_txn(txn: Cursor) -> None:
            txn.execute_batch(
                "DELETE FROM synapse_sticky_incomplete WHERE origin = ? AND event_id = ?",
                [(origin, event_id) for event_id in over],
            )
            txn.execute_batch(
                "UPDATE synapse_sticky_incomplete SET due_ms = ? WHERE origin = ? AND event_id = ?",
                [(due_ms, origin, event_id) for event_id, due_ms in due.items()],
            )
            pdus = []
            for event_id in event_ids:
                txn.execute(
                    f"SELECT {_INCOMPLETE} FROM synapse_sticky_incomplete"
                    " WHERE origin = ? AND event_id = ?",
                    (origin, event_id),
                )
                if (row := txn.fetchone()) is not None:
                    of, event, room, event_json, metadata, prevs = row
                    prev_event_ids = tuple(json.loads(prevs))
                    pdus.append(
                        IncompletePdu(of, event, room, event_json, metadata, prev_event_ids)
                    )
            self._hs.staging.stage_txn(txn, room_id, pdus)

        await self._hs.transact("stage_again", write_txn)

    # Pages of sliding sync

    async def note_page(self, connection: tuple[str, str, str], token: str, older: str) -> None:
        """Notes what is still to be read when the connection's client comes with this token."""

        def write_txn(txn: Cursor) -> None:
            now_ms = self._hs.now_ms()
            txn.execute(
                "DELETE FROM synapse_sticky_pages WHERE noted_ts_ms < ?",
                (now_ms - _FORGET_PAGE_AFTER_MS,),
            )
            txn.execute(
                "INSERT INTO synapse_sticky_pages"
                " (user_id, device_id, connection, token, older, noted_ts_ms)"
                " VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT (user_id, device_id, connection, token)"
                " DO UPDATE SET older = EXCLUDED.older, noted_ts_ms = EXCLUDED.noted_ts_ms",
                (*connection, token, older, now_ms),
            )

        await self._hs.transact("note_page", write_txn)

    async def page(self, connection: tuple[str, str, str], token: str) -> str | None:
        """What was noted; None if nothing was, or too long ago."""

        def read_txn(txn: Cursor) -> str | None:
            txn.execute(
                "SELECT older FROM synapse_sticky_pages"
                " WHERE user_id = ? AND device_id = ? AND connection = ? AND token = ?",
                (*connection, token),
            )
            row = txn.fetchone()
            return row[0] if row else None

        return await self._hs.transact("page", read_txn)


def _listed(values: Sequence[object]) -> str:
    return f"({', '.join('?' * len(values))})"
