"""Synapse's backlog of sticky events, in its table."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from synapse.module_api import RoomID

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Cause, Verdict
from synapse_sticky.homeserver.seams import table

SEAMS = (
    table(
        "destination_rooms_sticky_events_backlog",
        "destination text, room_id text, sticky_events_stream_position integer",
    ),
    table("rooms", "room_id text"),
    table("destinations", "destination text, last_successful_stream_ordering integer"),
    table("destination_rooms", "destination text, room_id text"),
    table("sticky_events", "stream_id integer, room_id text, sender text, expires_at integer"),
)

_INSERT = (
    "INSERT INTO destination_rooms_sticky_events_backlog AS backlog"
    " (destination, room_id, sticky_events_stream_position) "
)
_OR_LOWER = (
    " ON CONFLICT (destination, room_id) DO UPDATE"
    " SET sticky_events_stream_position = EXCLUDED.sticky_events_stream_position"
    " WHERE EXCLUDED.sticky_events_stream_position < backlog.sticky_events_stream_position"
)


class SynapseBacklog:
    """The part of ``federation.Federation`` that is about the backlog."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store

    async def backlog(self, destination: str) -> list[tuple[str, int]]:
        def read_txn(txn: Cursor) -> list[tuple[str, int]]:
            txn.execute(
                "SELECT room_id, sticky_events_stream_position"
                " FROM destination_rooms_sticky_events_backlog WHERE destination = ?",
                (destination,),
            )
            return [(room_id, position) for room_id, position in txn.fetchall()]

        return await self._homeserver.transact("backlog", read_txn)

    def add_backlog_txn(self, txn: Cursor, joins: Sequence[tuple[str, str]]) -> None:
        txn.execute_batch(
            # The state changes of a room outlive the room, and the table refers to rooms.
            "INSERT INTO destination_rooms_sticky_events_backlog"
            " (destination, room_id, sticky_events_stream_position)"
            " SELECT ?, room_id, 0 FROM rooms WHERE room_id = ?"
            " ON CONFLICT (destination, room_id) DO UPDATE SET sticky_events_stream_position = 0",
            joins,
        )

    async def add_to_backlog(self, some: Sequence[tuple[str, str, int]]) -> None:
        def write_txn(txn: Cursor) -> None:
            txn.execute_batch(
                f"{_INSERT} SELECT ?, room_id, ? FROM rooms WHERE room_id = ?{_OR_LOWER}",
                [(destination, position, room_id) for destination, room_id, position in some],
            )

        await self._homeserver.transact("add_to_backlog", write_txn)

    async def add_if_never_reached(self, destination: str) -> None:
        here, now_ms = self._homeserver.server_name, self._homeserver.now_ms()

        def write_txn(txn: Cursor) -> None:
            txn.execute(
                "SELECT 1 FROM destinations"
                " WHERE destination = ? AND last_successful_stream_ordering IS NOT NULL",
                (destination,),
            )
            if txn.fetchone() is not None:
                return
            txn.execute(
                f"{_INSERT} SELECT ?, d.room_id, MIN(s.stream_id) FROM destination_rooms AS d"
                " INNER JOIN rooms USING (room_id) INNER JOIN sticky_events AS s USING (room_id)"
                " WHERE d.destination = ? AND ? < s.expires_at AND s.sender LIKE ?"
                f" GROUP BY d.room_id{_OR_LOWER}",
                (destination, destination, now_ms, f"%:{here}"),
            )

        await self._homeserver.transact("add_if_never_reached", write_txn)

    def clear_backlog_txn(self, txn: Cursor, destination: str, room_id: str) -> None:
        txn.execute(
            "DELETE FROM destination_rooms_sticky_events_backlog"
            " WHERE destination = ? AND room_id = ?",
            (destination, room_id),
        )

    def leaving_out_deleted_rooms(
        self, original: Callable[..., Awaitable[None]]
    ) -> Callable[..., Awaitable[None]]:
        """Of a room that is deleted while a transaction with its events is under way, Synapse could
        not write down how far it got, as the row refers to the room. Its sending would stop."""

        async def mark(destination: str, room_id: RoomID, *args: Any, **options: Any) -> None:
            if not await self._is_known(room_id):
                return
            try:
                await original(destination, room_id, *args, **options)
            except Exception as e:
                cause = Cause.of_database(e)
                if cause is None or cause.verdict() is not Verdict.REFUSED:
                    raise
                if await self._is_known(room_id):
                    raise

        return mark

    async def _is_known(self, room_id: RoomID) -> bool:
        def read_txn(txn: Cursor) -> bool:
            txn.execute("SELECT 1 FROM rooms WHERE room_id = ?", (room_id.to_string(),))
            return txn.fetchone() is not None

        return await self._homeserver.transact("is_known", read_txn)
