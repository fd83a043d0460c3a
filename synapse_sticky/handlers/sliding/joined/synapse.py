"""Which rooms became a user's after a position, by Synapse's membership changes (D5)."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from synapse.api.constants import StickyEvent
from synapse.types import RoomStreamToken
from synapse.types.handlers.sliding_sync import RoomSyncConfig

from synapse_sticky.handlers.sliding.pages import Shown
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.seams import STORE, Attribute, attributes, method, table
from synapse_sticky.homeserver.spec import JOIN, LEAVE, MEMBER
from synapse_sticky.index import Position

_TYPES = "synapse.types.handlers.sliding_sync"

SEAMS = (
    *attributes(f"{_TYPES}.SlidingSyncConfig", "lists", "room_subscriptions"),
    method(f"{_TYPES}.RoomSyncConfig", "from_room_config(room_params, /) -> RoomSyncConfig"),
    method(f"{_TYPES}.RoomSyncConfig", "must_await_full_state(is_mine_id, /) -> bool"),
    *attributes("synapse.types.StreamToken", "room_key", "un_partial_stated_rooms_key"),
    Attribute("synapse.types.StreamToken", "account_data_key"),
    method("synapse.types.RoomStreamToken", "get_stream_pos_for_instance(instance_name, /) -> int"),
    Attribute("synapse.types.RoomStreamToken", "stream"),
    method(
        STORE, "async get_sliding_sync_membership_changes(user_id, from_key, to_key, /) -> dict"
    ),
    method(
        STORE, "async get_un_partial_stated_rooms_between(last_id, current_id, room_ids, /) -> set"
    ),
    method(STORE, "async find_first_stream_ordering_after_ts(ts, /) -> int"),
    table(
        "current_state_delta_stream",
        "room_id text, instance_name text, stream_id integer, type text, state_key text, "
        "event_id text, prev_event_id text",
    ),
    table("room_memberships", "event_id text, membership text"),
    table(
        "local_current_membership",
        "room_id text, user_id text, membership text, event_stream_ordering integer",
    ),
)

_HOUR_MS = StickyEvent.MAX_DURATION.as_millis()
_LOOK_UP_EVERY_MS = 60_000


class SynapseJoinedRooms:
    """The rooms that a user has joined of late.

    writers: the instances that write to the events stream.
    """

    def __init__(self, homeserver: Homeserver, writers: Sequence[str]) -> None:
        self._homeserver = homeserver
        self._store = homeserver.store
        self._writers = writers
        self._hour_ago = Position(0)
        self._looked_up_ms: int | None = None

    def shown_by(self, token: Any) -> Shown:
        """What a response up to this ``StreamToken`` takes into account."""
        rooms = token.room_key
        at = {writer: rooms.get_stream_pos_for_instance(writer) for writer in self._writers}
        ahead = {writer: position for writer, position in at.items() if position > rooms.stream}
        return Shown(
            Position(rooms.stream, ahead),
            token.un_partial_stated_rooms_key,
            token.account_data_key,
        )

    async def joined_after(
        self, user_id: str, room_ids: AbstractSet[str], after: Position, up_to: Any
    ) -> set[str]:
        """Those of the rooms that the user was not in at ``after``, and was at ``up_to``, a
        ``RoomStreamToken``."""
        # Most often Synapse knows without a query that nothing has changed.
        changes = await self._store.get_sliding_sync_membership_changes(
            user_id, RoomStreamToken(stream=after.stream_id), up_to
        )
        changed = room_ids & changes.keys()
        if not changed:
            return set()

        # Synapse counts some changes of a profile among them. The state changes know better.
        def read_txn(txn: Cursor) -> set[str]:
            return self._joined_txn(txn, user_id, changed, after, up_to)

        return await self._homeserver.transact("newly_joined", read_txn)

    async def joined_within_the_hour(
        self, user_id: str, room_ids: AbstractSet[str], up_to: Any
    ) -> set[str]:
        """Those of the rooms that the user has joined within the hour, and was in at ``up_to``."""
        after = await self._position_an_hour_ago()

        # An hour's changes are many. Those of the user are few, however long ago.
        def read_txn(txn: Cursor) -> set[str]:
            txn.execute(
                "SELECT room_id FROM local_current_membership"
                " WHERE user_id = ? AND membership = ? AND ? < event_stream_ordering",
                (user_id, JOIN, after.stream_id),
            )
            changed = room_ids & {room_id for (room_id,) in txn.fetchall()}
            return self._joined_txn(txn, user_id, changed, after, up_to) if changed else set()

        return await self._homeserver.transact("joined_within_the_hour", read_txn)

    def _joined_txn(
        self,
        txn: Cursor,
        user_id: str,
        room_ids: AbstractSet[str],
        after: Position,
        up_to: Any,
    ) -> set[str]:
        rows = []
        for portion in portions(room_ids):
            clause, args = self._homeserver.in_list("d.room_id", portion)
            txn.execute(
                f"""
                SELECT d.room_id, d.instance_name, d.stream_id
                FROM current_state_delta_stream AS d
                INNER JOIN room_memberships AS m ON m.event_id = d.event_id
                LEFT JOIN room_memberships AS before ON before.event_id = d.prev_event_id
                WHERE d.type = ? AND d.state_key = ? AND ? < d.stream_id
                    AND m.membership = ? AND COALESCE(before.membership, ?) != ? AND {clause}
                """,
                (*(MEMBER, user_id, after.stream_id), *(JOIN, LEAVE, JOIN, *args)),
            )
            rows += txn.fetchall()
        return {
            room_id
            for room_id, writer, stream_id in rows
            if after.of(writer) < stream_id <= up_to.get_stream_pos_for_instance(writer)
        }

    async def _position_an_hour_ago(self) -> Position:
        """Whatever is sticky now came in after this position. It may be a minute further back."""
        now_ms = self._homeserver.steady_ms()
        looked_up_ms = self._looked_up_ms
        if looked_up_ms is None or now_ms - looked_up_ms > _LOOK_UP_EVERY_MS:
            first = await self._store.find_first_stream_ordering_after_ts(
                self._homeserver.now_ms() - _HOUR_MS
            )
            self._hour_ago = Position(max(first - 1, 0))
            self._looked_up_ms = now_ms
        return self._hour_ago

    async def no_longer_partial(
        self, sync_config: Any, room_ids: AbstractSet[str], after: int, up_to: int
    ) -> set[str]:
        """Those of the rooms that were kept from the client until their state was whole.

        Args:
            after: a position of the stream of such rooms, exclusive.
            up_to: the same, inclusive.
        """
        if after == up_to or not room_ids:
            return set()
        asked_for = [
            *(sync_config.lists or {}).values(),
            *(sync_config.room_subscriptions or {}).values(),
        ]
        is_mine = self._homeserver.api.is_mine
        if not any(
            RoomSyncConfig.from_room_config(part).must_await_full_state(is_mine)
            for part in asked_for
        ):
            return set()
        return await self._store.get_un_partial_stated_rooms_between(after, up_to, room_ids)
