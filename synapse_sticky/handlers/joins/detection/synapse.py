"""The changes of rooms' state in Synapse's database, and who was in a room before them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attr
from synapse.api.constants import EventTypes, Membership

from synapse_sticky.handlers.joins.detection.reader import RoomChanges, ServerJoin
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.changed import ChangedRooms
from synapse_sticky.homeserver.seams import STORE, attributes, method, table

if TYPE_CHECKING:
    from synapse.storage.databases.main.state_deltas import StateDelta

_MEMBER, _CREATE = EventTypes.Member, EventTypes.Create
_JOIN = Membership.JOIN
_PAGE = 100

SEAMS = (
    method(
        STORE,
        "async get_partial_current_state_deltas(prev_stream_id, max_stream_id, /, *, limit) "
        "-> tuple[_, _]",
    ),
    method(STORE, "get_room_max_stream_ordering() -> int"),
    *attributes(
        "synapse.storage.databases.main.state_deltas.StateDelta",
        *("stream_id", "room_id", "event_type", "state_key", "event_id", "prev_event_id"),
    ),
    table(
        "current_state_events",
        "room_id text, type text, state_key text, membership text, event_id text, "
        "event_stream_ordering integer",
    ),
    table(
        "current_state_delta_stream",
        "stream_id integer, room_id text, type text, state_key text, event_id text, "
        "prev_event_id text",
    ),
    table("room_memberships", "event_id text, user_id text, membership text"),
    table(
        "events",
        "event_id text, room_id text, stream_ordering integer, depth integer, outlier "
        "boolean, received_ts integer",
    ),
)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Membership:
    room_id: str
    user_id: str
    membership: str
    stream_ordering: int
    depth: int
    outlier: bool
    received_ts_ms: int


class SynapseStateChanges:
    """Implements ``reader.StateChanges``."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self.may_have_changed = ChangedRooms(homeserver).may_have_changed

    def state_position(self) -> int:
        return self._store.get_room_max_stream_ordering()

    async def page(self, *, after: int, up_to: int) -> tuple[int, list[RoomChanges]]:
        position, deltas = await self._store.get_partial_current_state_deltas(
            after, up_to, limit=_PAGE
        )
        by_room: dict[str, list[StateDelta]] = {}
        for delta in deltas:
            by_room.setdefault(delta.room_id, []).append(delta)
        return position, [RoomChanges(*room) for room in by_room.items()]

    async def server_joins(
        self, rooms: Sequence[RoomChanges], *, not_before_ms: int
    ) -> list[ServerJoin]:
        deltas: list[StateDelta] = [delta for room in rooms for delta in room.changes]
        changes = [d for d in deltas if d.event_type == _MEMBER and d.event_id]
        # When this server itself joins, the whole state of the room arrives as changes at one
        # position. Only then is a new create event among them; other changes may also share a
        # position. The members of that state are no newcomers to this server's events, unless this
        # server was in the room before, and they joined while it was away.
        own_joins = {
            (d.stream_id, d.room_id)
            for d in deltas
            if d.event_type == _CREATE and d.event_id and d.prev_event_id is None
        }
        joins = {
            ServerJoin(self._homeserver.server_name, room_id): None for _, room_id in own_joins
        }
        changes = [
            d for d in changes if _domain(d.state_key) not in (self._homeserver.server_name, None)
        ]
        if not changes:
            return list(joins)
        memberships = await self._memberships(
            e for d in changes for e in (d.event_id, d.prev_event_id) if e
        )
        stayed_at: dict[tuple[int, str], set[str] | None] = {}
        for change in changes:
            new = memberships.get(change.event_id or "")
            if new is None or not _is_join(change, new, memberships, not_before_ms):
                continue
            at = (change.stream_id, change.room_id)
            if (at in own_joins or new.outlier) and at not in stayed_at:
                stayed_at[at] = await self._servers_at_leave(*at, not_before_ms)
            stayed = stayed_at.get(at)
            server = _domain(new.user_id) or ""
            joined_while_away = stayed is not None and server not in stayed
            if joined_while_away or (at not in own_joins and await self._is_server_join(new)):
                joins[ServerJoin(server, new.room_id)] = None
        return list(joins)

    async def _servers_at_leave(
        self, before: int, room_id: str, not_before_ms: int
    ) -> set[str] | None:
        """The servers that stayed when this server last left the room; None if it has not left the
        room since ``not_before_ms``."""

        def read_txn(txn: Cursor) -> set[str] | None:
            # A server that leaves forgets all of the room's state.
            txn.execute(
                "SELECT MAX(stream_id) FROM current_state_delta_stream"
                " WHERE room_id = ? AND stream_id < ? AND type = ? AND event_id IS NULL",
                (room_id, before, _CREATE),
            )
            row = txn.fetchone()
            if row is None or row[0] is None:
                return None
            left_at = row[0]
            txn.execute(
                "SELECT received_ts FROM events WHERE stream_ordering >= ?"
                " ORDER BY stream_ordering LIMIT 1",
                (left_at,),
            )
            row = txn.fetchone()
            if row is None or row[0] < not_before_ms:
                return None
            txn.execute(
                "SELECT d.state_key FROM current_state_delta_stream AS d"
                " INNER JOIN room_memberships AS m ON m.event_id = d.prev_event_id"
                " WHERE d.room_id = ? AND d.stream_id = ? AND d.type = ? AND d.event_id IS NULL"
                " AND m.membership = ?",
                (room_id, left_at, _MEMBER, _JOIN),
            )
            return {server for (user_id,) in txn.fetchall() if (server := _domain(user_id))}

        return await self._homeserver.transact("left_behind", read_txn)

    async def _memberships(self, event_ids: Iterable[str]) -> dict[str, _Membership]:
        clause, args = self._homeserver.in_list("e.event_id", set(event_ids))

        def read_txn(txn: Cursor) -> dict[str, _Membership]:
            txn.execute(
                "SELECT e.event_id, e.room_id, m.user_id, m.membership, e.stream_ordering,"
                " e.depth, e.outlier, e.received_ts"
                " FROM events AS e INNER JOIN room_memberships AS m ON m.event_id = e.event_id"
                f" WHERE {clause}",
                args,
            )
            return {
                row[0]: _Membership(row[1], row[2], row[3], row[4], row[5], bool(row[6]), row[7])
                for row in txn.fetchall()
            }

        return await self._homeserver.transact("memberships", read_txn)

    async def _is_server_join(self, new: _Membership) -> bool:
        def read_txn(txn: Cursor) -> bool:
            # Only a member who has been joined since before proves that the server is no
            # newcomer. Others may have joined along with this one, in changes yet to be read.
            txn.execute(
                "SELECT state_key FROM current_state_events"
                " WHERE room_id = ? AND type = ? AND membership = ? AND state_key LIKE ?"
                " AND state_key != ?"
                " AND (event_stream_ordering IS NULL OR event_stream_ordering < ?)",
                (
                    new.room_id,
                    _MEMBER,
                    _JOIN,
                    f"%:{_domain(new.user_id)}",
                    new.user_id,
                    new.stream_ordering,
                ),
            )
            # LIKE is only a first sieve: it ignores case, and `_` stands for any character.
            domain = _domain(new.user_id)
            if any(_domain(user_id) == domain for (user_id,) in txn.fetchall()):
                return False
            if not new.outlier:
                return True
            # Synapse fetched an outlier as part of the state. If it is older than this server's own
            # join, /send_join named its server, and Synapse has sent that server everything since.
            txn.execute(
                "SELECT MIN(e.depth) FROM current_state_events AS c"
                " INNER JOIN events AS e ON e.event_id = c.event_id"
                " WHERE c.room_id = ? AND c.type = ? AND c.membership = ? AND c.state_key LIKE ?",
                (
                    new.room_id,
                    _MEMBER,
                    _JOIN,
                    f"%:{self._homeserver.server_name}",
                ),
            )
            row = txn.fetchone()
            return row is None or row[0] is None or new.depth > row[0]

        return await self._homeserver.transact("is_server_join", read_txn)


def _is_join(
    change: "StateDelta",
    new: _Membership,
    memberships: dict[str, _Membership],
    not_before_ms: int,
) -> bool:
    if new.membership != _JOIN or new.received_ts_ms < not_before_ms:
        return False
    old = memberships.get(change.prev_event_id or "")
    return old is None or old.membership != _JOIN  # else a profile change


def _domain(user_id: str) -> str | None:
    _, colon, domain = user_id.partition(":")
    return domain if colon else None
