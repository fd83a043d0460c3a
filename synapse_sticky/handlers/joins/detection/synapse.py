"""The changes of rooms' state in Synapse's database, and who was in a room before them."""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence

import attr

from synapse_sticky.handlers.joins.detection.reader import RoomChanges, ServerJoin
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.changed import ChangedRooms
from synapse_sticky.homeserver.seams import STORE, method, table
from synapse_sticky.homeserver.spec import CREATE, JOIN, MEMBER, SERVER_ACL

_PAGE = 100
_AT_ONCE = 1_000
"""So many rows are fetched, and looked at, before others have their turn."""
_MOST_NAMED = 500
"""So many servers a query names. If there are more, it reads those of all servers."""
_BEFORE_ALL = -(2**62)

SEAMS = (
    method(STORE, "get_room_max_stream_ordering() -> int"),
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
        "event_id text, stream_ordering integer, depth integer, outlier boolean, "
        "received_ts integer",
    ),
)


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Position:
    """The changes of a room at one stream position. All changes at a position are of one room.

    is_own_join: whether this server has joined the room there.
    """

    stream_id: int
    is_own_join: bool


_Join = tuple[int, str, str, int, int, bool]
"""The join of another server's user who was not joined before: the stream position, the user, the
server, the event's stream ordering and depth, and whether it is an outlier.

A large room has 50,000. Python's garbage collector looks through as many objects of a class again
and again, and then through all of the process. It lets a tuple of plain values alone.
"""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Joins:
    """Joins, as many in each portion as are looked at before others have their turn.

    with_outlier: the positions with an outlier.
    """

    portions: list[list[_Join]] = attr.Factory(list)
    with_outlier: set[int] = attr.Factory(set)


_Earliest = Mapping[ServerJoin, Sequence[tuple[str, int]]]
"""By server and room: the two users who joined first of all who are joined now, and the stream
orderings of their joins."""


class SynapseStateChanges:
    """Implements ``reader.StateChanges``.

    A few queries answer for a whole page, however many members it has: they name positions, rooms
    and servers, of which there is a bounded number, and no events.
    """

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        find = "strpos" if homeserver.is_postgres else "instr"
        self._colon_in = f"{find}({{0}}, ':')".format
        self._server_of = f"substr({{0}}, {find}({{0}}, ':') + 1)".format
        self.may_have_changed = ChangedRooms(homeserver).may_have_changed

    def state_position(self) -> int:
        return self._store.get_room_max_stream_ordering()

    async def page(self, *, after: int, up_to: int) -> tuple[int, list[RoomChanges]]:
        if not self.may_have_changed(after):
            return up_to, []

        def read_txn(txn: Cursor) -> list[tuple[int, str, int, int, int]]:
            # When this server itself joins, the whole state of the room arrives as changes at one
            # position. Only then is a new create event among them; other changes may also share a
            # position.
            txn.execute(
                "SELECT stream_id, MIN(room_id), COUNT(*), MAX(CASE WHEN type = ?"
                " AND event_id IS NOT NULL AND prev_event_id IS NULL THEN 1 ELSE 0 END),"
                " MAX(CASE WHEN type = ? THEN 1 ELSE 0 END)"
                " FROM current_state_delta_stream WHERE ? < stream_id AND stream_id <= ?"
                " AND type IN (?, ?, ?) GROUP BY stream_id ORDER BY stream_id LIMIT ?",
                (CREATE, SERVER_ACL, after, up_to, MEMBER, CREATE, SERVER_ACL, _PAGE + 1),
            )
            return [(row[0], row[1], row[2], row[3], row[4]) for row in txn.fetchall()]

        found = await self._homeserver.transact("state_changes", read_txn)
        reached, total = up_to, 0
        rooms: dict[str, list[_Position]] = {}
        counts: dict[str, int] = {}
        of_acl: set[str] = set()
        for number, (stream_id, room_id, count, is_own_join, is_of_acl) in enumerate(found):
            total += count
            # A position is not split: it may have more than a page.
            if number == _PAGE or (number and total > _PAGE):
                reached = found[number - 1][0]
                break
            rooms.setdefault(room_id, []).append(_Position(stream_id, bool(is_own_join)))
            counts[room_id] = counts.get(room_id, 0) + count
            if is_of_acl:
                of_acl.add(room_id)
        return reached, [
            RoomChanges(room_id, positions, counts[room_id], room_id in of_acl)
            for room_id, positions in rooms.items()
        ]

    async def server_joins(
        self, rooms: Sequence[RoomChanges], *, not_before_ms: int
    ) -> list[ServerJoin]:
        here = self._homeserver.server_name
        room_of = {position.stream_id: room.room_id for room in rooms for position in room.changes}
        own_joins = {p.stream_id for room in rooms for p in room.changes if p.is_own_join}
        # The members of the state that this server joins with are no newcomers to its events,
        # unless it was in the room before, and they joined while it was away.
        stayed_at = await self._servers_at_leave(room_of, own_joins, not_before_ms)
        joins = await self._joins(room_of.keys() - (own_joins - stayed_at.keys()), not_before_ms)
        with_outlier = joins.with_outlier - own_joins
        stayed_at |= await self._servers_at_leave(room_of, with_outlier, not_before_ms)
        depths = await self._own_depths({room_of[stream_id] for stream_id in with_outlier})

        def is_known(join: _Join) -> bool:
            # Synapse fetched an outlier as part of the state. If it is older than this server's own
            # join, /send_join named its server, and Synapse has sent that server everything since.
            stream_id, _, _, _, depth, outlier = join
            own_depth = depths.get(room_of[stream_id])
            return stream_id in own_joins or (
                outlier and own_depth is not None and depth <= own_depth
            )

        found = {ServerJoin(here, room_of[stream_id]): None for stream_id in sorted(own_joins)}
        left: list[list[_Join]] = []
        room_ids, servers = set[str](), set[str]()
        async for portion in self._in_turns(joins.portions):
            for join in portion:
                stayed = stayed_at.get(join[0])
                if stayed is not None and join[2] not in stayed:
                    found[ServerJoin(join[2], room_of[join[0]])] = None
            # Of a large room's members few are left here, and only these are asked about.
            if new := [join for join in portion if not is_known(join)]:
                left.append(new)
                room_ids.update(room_of[join[0]] for join in new)
                servers.update(join[2] for join in new)

        earliest = await self._earliest(room_ids, servers)
        async for portion in self._in_turns(left):
            for stream_id, user_id, server, ordering, _, _ in portion:
                of_server = ServerJoin(server, room_of[stream_id])
                if _is_first(user_id, ordering, earliest.get(of_server, ())):
                    found[of_server] = None
        return list(found)

    async def _in_turns(self, portions: list[list[_Join]]) -> AsyncIterator[list[_Join]]:
        """Takes out each portion in turn. Letting go of all at once would take long, too (H3)."""
        portions.reverse()
        while portions:
            portion = portions.pop()
            yield portion
            if portions:
                await self._homeserver.give_way()

    async def _joins(self, positions: Collection[int], not_before_ms: int) -> _Joins:
        """The joins at these positions, changes of profiles left out, that were received in
        time."""
        if not positions:
            return _Joins()
        here = self._homeserver.server_name
        clause, args = self._homeserver.in_list("d.stream_id", positions)

        def read_txn(txn: Cursor) -> _Joins:
            txn.execute(
                "SELECT d.stream_id, m.user_id, e.stream_ordering, e.depth, e.outlier"
                " FROM current_state_delta_stream AS d"
                " INNER JOIN events AS e ON e.event_id = d.event_id"
                " INNER JOIN room_memberships AS m ON m.event_id = d.event_id"
                " LEFT JOIN room_memberships AS old ON old.event_id = d.prev_event_id"
                f" WHERE {clause} AND d.type = ? AND m.membership = ? AND e.received_ts >= ?"
                " AND COALESCE(old.membership, '') != ?",
                (*args, MEMBER, JOIN, not_before_ms, JOIN),
            )
            joins = _Joins()
            # The reactor stands still while a database's client makes objects of its rows.
            while rows := txn.fetchmany(_AT_ONCE):
                portion = [
                    (stream_id, user_id, server, ordering, depth, bool(outlier))
                    for stream_id, user_id, ordering, depth, outlier in rows
                    if (server := user_id.partition(":")[2]) not in ("", here)
                ]
                joins.portions.append(portion)
                joins.with_outlier.update(join[0] for join in portion if join[-1])
            return joins

        return await self._homeserver.transact("memberships", read_txn)

    async def _earliest(self, room_ids: Collection[str], servers: Collection[str]) -> _Earliest:
        """The earliest members of these rooms and servers, and maybe of others.

        A member who joined before a join proves that the server is no newcomer there. A member who
        joined after it proves nothing: that join may be in changes yet to be read.
        """
        if not room_ids:
            return {}
        clause, args = self._homeserver.in_list("room_id", room_ids)
        server = self._server_of("state_key")
        if len(servers) <= _MOST_NAMED:
            named, more = self._homeserver.in_list(server, servers)
            clause, args = f"{clause} AND {named}", [*args, *more]
        joined_at = f"COALESCE(event_stream_ordering, {_BEFORE_ALL})"

        def read_txn(txn: Cursor) -> _Earliest:
            txn.execute(
                "SELECT room_id, server, state_key, joined_at FROM ("
                f"SELECT room_id, {server} AS server, state_key, {joined_at} AS joined_at,"
                f" ROW_NUMBER() OVER (PARTITION BY room_id, {server} ORDER BY {joined_at}) AS place"
                f" FROM current_state_events WHERE {clause} AND type = ? AND membership = ?"
                f" AND {self._colon_in('state_key')} > 0"
                ") AS members WHERE place <= 2",
                (*args, MEMBER, JOIN),
            )
            earliest: dict[ServerJoin, list[tuple[str, int]]] = {}
            while rows := txn.fetchmany(_AT_ONCE):
                for room_id, of_server, user_id, ordering in rows:
                    earliest.setdefault(ServerJoin(of_server, room_id), []).append(
                        (user_id, ordering)
                    )
            return earliest

        return await self._homeserver.transact("earliest_members", read_txn)

    async def _own_depths(self, room_ids: Collection[str]) -> dict[str, int]:
        """By room: the depth of the first join of this server's users who are joined now."""
        if not room_ids:
            return {}
        clause, args = self._homeserver.in_list("c.room_id", room_ids)

        def read_txn(txn: Cursor) -> dict[str, int]:
            txn.execute(
                "SELECT c.room_id, MIN(e.depth) FROM current_state_events AS c"
                " INNER JOIN events AS e ON e.event_id = c.event_id"
                f" WHERE {clause} AND c.type = ? AND c.membership = ?"
                f" AND {self._server_of('c.state_key')} = ? GROUP BY c.room_id",
                (*args, MEMBER, JOIN, self._homeserver.server_name),
            )
            return dict(txn.fetchall())

        return await self._homeserver.transact("own_depths", read_txn)

    async def _servers_at_leave(
        self, room_of: Mapping[int, str], positions: Collection[int], not_before_ms: int
    ) -> dict[int, set[str]]:
        """By position: the servers that stayed when this server last left the room before it. A
        position is left out if this server has not left its room since ``not_before_ms``."""
        if not positions:
            return {}

        def read_txn(txn: Cursor) -> dict[int, set[str]]:
            stayed = {p: self._stayed_txn(txn, room_of[p], p, not_before_ms) for p in positions}
            return {p: servers for p, servers in stayed.items() if servers is not None}

        return await self._homeserver.transact("left_behind", read_txn)

    def _stayed_txn(
        self, txn: Cursor, room_id: str, before: int, not_before_ms: int
    ) -> set[str] | None:
        # A server that leaves forgets all of the room's state.
        txn.execute(
            "SELECT MAX(stream_id) FROM current_state_delta_stream"
            " WHERE room_id = ? AND stream_id < ? AND type = ? AND event_id IS NULL",
            (room_id, before, CREATE),
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
            f"SELECT DISTINCT {self._server_of('d.state_key')}"
            " FROM current_state_delta_stream AS d"
            " INNER JOIN room_memberships AS m ON m.event_id = d.prev_event_id"
            " WHERE d.room_id = ? AND d.stream_id = ? AND d.type = ? AND d.event_id IS NULL"
            " AND m.membership = ?",
            (room_id, left_at, MEMBER, JOIN),
        )
        return {server for (server,) in txn.fetchall()}


def _is_first(user_id: str, ordering: int, earliest: Sequence[tuple[str, int]]) -> bool:
    """Had nobody else of the server joined before, of those who are joined now?"""
    return not any(joined_at < ordering and other_id != user_id for other_id, joined_at in earliest)
