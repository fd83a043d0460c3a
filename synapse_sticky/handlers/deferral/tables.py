"""The deferred events, until they are released, redacted or expired."""

from collections.abc import Callable, Collection, Sequence

import attr

from synapse_sticky.handlers.deferral.handler import NewStickyEvent
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.layout import Migrations, Waiting
from synapse_sticky.orders import Release

_PAGE = 500
_FIRST = -(2**63)

_COLUMNS = "event_id, room_id, sender, expires_at_ms, event_stream_ordering, sticky_key, newness_ms"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Released:
    """What has become of deferred events whose turn it was.

    room_ids: those of the released events.
    limits, expired: for each released event, and each one that has expired, the name of the limit
        that deferred it; None if a version that does not note it has deferred it.
    """

    room_ids: Sequence[str]
    limits: Sequence[str | None]
    expired: Sequence[str | None]


class DeferredTable:
    """The deferred events of all processes, each with its sender's server."""

    duty = "deferral"
    contents = "deferred events. They are in the timeline, and never become sticky"
    waiting: Waiting = (
        "deferred events",
        "SELECT COUNT(*) FROM synapse_sticky_deferred WHERE ? < expires_at_ms",
    )
    migrations: Migrations = (
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
        # Rows of before have neither, and are keys of their own. An index is not needed: the order
        # of release is made in memory.
        (
            "ALTER TABLE synapse_sticky_deferred ADD COLUMN IF NOT EXISTS sticky_key BIGINT",
            "ALTER TABLE synapse_sticky_deferred ADD COLUMN IF NOT EXISTS newness_ms BIGINT",
        ),
        # For administrators. Rows of before have neither.
        (
            "ALTER TABLE synapse_sticky_deferred ADD COLUMN IF NOT EXISTS past_limit TEXT",
            "ALTER TABLE synapse_sticky_deferred ADD COLUMN IF NOT EXISTS deferred_ms BIGINT",
            """
            CREATE INDEX IF NOT EXISTS synapse_sticky_deferred_room
                ON synapse_sticky_deferred (room_id, event_id)
            """,
        ),
    )

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    def insert_txn(self, txn: Cursor, events: Sequence[tuple[NewStickyEvent, str, str]]) -> None:
        """Adds events, each with its sender's server and the name of the limit that it is past, in
        Synapse's own transaction. That may be tried again."""
        now_ms = self._homeserver.now_ms()
        txn.execute_batch(
            f"INSERT INTO synapse_sticky_deferred ({_COLUMNS}, server, past_limit, deferred_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING",
            [
                (
                    event.event_id,
                    event.room_id,
                    event.sender,
                    event.expires_at_ms,
                    event.event_stream_ordering,
                    event.key,
                    event.newness_ms,
                    server,
                    limit,
                    now_ms,
                )
                for event, server, limit in events
            ],
        )

    def count_txn(self, txn: Cursor, server: str, at_most: int) -> int:
        """How many unexpired events of this server's users are deferred; no more are counted than
        ``at_most``, as after a hold there may be any number."""
        txn.execute(
            "SELECT COUNT(*) FROM (SELECT 1 FROM synapse_sticky_deferred"
            " WHERE server = ? AND expires_at_ms > ? LIMIT ?) AS few",
            (server, self._homeserver.now_ms(), at_most),
        )
        row = txn.fetchone()
        return int(row[0]) if row else 0

    async def page(self, after_event_id: str) -> list[tuple[NewStickyEvent, str]]:
        """A page of the events with their senders' servers, by event ID; empty at the end."""

        def read_txn(txn: Cursor) -> list[tuple[NewStickyEvent, str]]:
            txn.execute(
                f"SELECT {_COLUMNS}, server FROM synapse_sticky_deferred"
                " WHERE event_id > ? ORDER BY event_id LIMIT ?",
                (after_event_id, _PAGE),
            )
            return [(NewStickyEvent(*row[:-1]), row[-1]) for row in txn.fetchall()]

        return await self._homeserver.transact("deferred", read_txn)

    async def of_room(self, room_id: str, after_event_id: str, limit: int) -> list[str]:
        """The next IDs of the room's events, by event ID; empty at the end."""

        def read_txn(txn: Cursor) -> list[str]:
            txn.execute(
                "SELECT event_id FROM synapse_sticky_deferred"
                " WHERE room_id = ? AND event_id > ? ORDER BY event_id LIMIT ?",
                (room_id, after_event_id, limit),
            )
            return [event_id for (event_id,) in txn.fetchall()]

        return await self._homeserver.transact("deferred_of_room", read_txn)

    async def release(
        self,
        event_ids: Sequence[str],
        still_sticky: Collection[str],
        enter_txn: Callable[[Cursor, Sequence[NewStickyEvent]], None],
    ) -> Released:
        """Deletes these events, and in the same transaction enters into the stream those that are
        still sticky and unexpired.

        Args:
            event_ids: in the order of their release.
            enter_txn: enters events into the stream, in the given order.
        """

        def write_txn(txn: Cursor) -> Released:
            deferred: dict[str, NewStickyEvent] = {}
            limits: dict[str, str | None] = {}
            now_ms = self._homeserver.now_ms()
            for portion in portions(event_ids):
                clause, args = self._homeserver.in_list("event_id", portion)
                txn.execute(
                    f"SELECT {_COLUMNS}, past_limit FROM synapse_sticky_deferred WHERE {clause}",
                    args,
                )
                for *columns, limit in txn.fetchall():
                    event = NewStickyEvent(*columns)
                    deferred[event.event_id], limits[event.event_id] = event, limit
                txn.execute(f"DELETE FROM synapse_sticky_deferred WHERE {clause}", args)
            sticky = [deferred[e] for e in event_ids if e in deferred and e in still_sticky]
            released = [event for event in sticky if now_ms < event.expires_at_ms]
            enter_txn(txn, released)
            return Released(
                list({event.room_id: None for event in released}),
                [limits[event.event_id] for event in released],
                [limits[event.event_id] for event in sticky if event.expires_at_ms <= now_ms],
            )

        return await self._homeserver.transact("release", write_txn)

    async def drop(self, event_ids: Collection[str]) -> list[str | None]:
        """Deletes these events. They are not released. Gives the name of the limit that deferred
        each of them; None if a version that does not note it has deferred it."""

        def write_txn(txn: Cursor) -> list[str | None]:
            limits: list[str | None] = []
            for portion in portions(event_ids):
                clause, args = self._homeserver.in_list("event_id", portion)
                of_these = f"FROM synapse_sticky_deferred WHERE {clause}"
                txn.execute(f"SELECT past_limit {of_these}", args)
                limits += [limit for (limit,) in txn.fetchall()]
                txn.execute(f"DELETE {of_these}", args)
            return limits

        return await self._homeserver.transact("drop_deferred", write_txn)

    async def matching(
        self, of: Release, after: int | None, limit: int, *, is_expired: bool = False
    ) -> list[tuple[int, str, str]]:
        """The next events of a server, room or sender, in the order of the stream of all events:
        ``(position, event_id, room_id)``. With ``is_expired`` those that have expired, else the
        others. It reads all rows of the server or the room."""
        wanted = {"server": of.server, "room_id": of.room_id, "sender": of.sender}
        if of.sender is not None:
            # There is no index by sender.
            wanted["server"] = of.server or of.sender.partition(":")[2]
        given: dict[str, str | int] = {
            column: value for column, value in wanted.items() if value is not None
        }
        where = " AND ".join(f"{column} = ?" for column in given)
        if of.made_ms is not None:
            # A process of version 0.1.0 does not write it.
            where += " AND (deferred_ms IS NULL OR deferred_ms <= ?)"
            given["deferred_ms"] = of.made_ms
        sign = "<=" if is_expired else ">"

        def read_txn(txn: Cursor) -> list[tuple[int, str, str]]:
            txn.execute(
                "SELECT event_stream_ordering, event_id, room_id FROM synapse_sticky_deferred"
                f" WHERE {where} AND event_stream_ordering > ? AND expires_at_ms {sign} ?"
                " ORDER BY event_stream_ordering LIMIT ?",
                (
                    *given.values(),
                    _FIRST if after is None else after,
                    self._homeserver.now_ms(),
                    limit,
                ),
            )
            return [(at, event_id, room_id) for at, event_id, room_id in txn.fetchall()]

        return await self._homeserver.transact("deferred_of", read_txn)
