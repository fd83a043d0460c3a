"""What the index has of some senders."""

import heapq
from collections.abc import AsyncIterator, Collection, Set

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.position import Position
from synapse_sticky.index.follower import IndexFollower

_STEP = 500
"""So many events or rooms are looked at before others have their turn (H3)."""

MOST = 1_000
"""So many events are given, as all of them go into one response."""


class EventsOfSenders:
    """Looks through whole rooms: for what happens rarely."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower) -> None:
        self._homeserver = homeserver
        self._follower = follower

    async def find(
        self, senders: Collection[str], room_ids: Collection[str], after: Position, up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the IDs of the senders' unexpired events between two positions of the sticky
        events stream, in its order; ``after`` exclusive. Of more than ``MOST`` the newest.

        What the index does not have, as just after a start, the table has.
        """
        newest: list[tuple[int, str, str]] = []
        holds = await self._follower.catch_up(lambda: self._follower.holds(up_to) or None)
        find = self._in_index if holds else self._in_table
        async for found in find({*senders}, {*room_ids}, after, up_to):
            heapq.heappush(newest, found)
            if len(newest) > MOST:
                heapq.heappop(newest)
        by_room: dict[str, list[str]] = {}
        for _, room_id, event_id in sorted(newest):
            by_room.setdefault(room_id, []).append(event_id)
        return by_room

    async def _in_index(
        self, senders: Set[str], room_ids: Set[str], after: Position, up_to: Position
    ) -> AsyncIterator[tuple[int, str, str]]:
        seen = 0
        for room_id in room_ids:
            index, now_ms = self._follower.index, self._homeserver.now_ms()
            rows = index.events_in_rooms(
                [room_id],
                *(after.stream_id, after.writers, up_to.stream_id, up_to.writers, now_ms, None),
            )
            for _, _, event_id in rows:
                row = index.get(event_id)
                if row is not None and row[3] in senders:
                    yield row[0], room_id, event_id
            seen += len(rows) + 1
            if seen >= _STEP:
                seen = 0
                await self._homeserver.give_way()

    async def _in_table(
        self, senders: Set[str], room_ids: Set[str], after: Position, up_to: Position
    ) -> AsyncIterator[tuple[int, str, str]]:
        stream, read = self._follower.stream, after.stream_id
        last = max(up_to.stream_id, *up_to.writers.values(), 0)
        while rows := await stream.rows(after=read, up_to=last, limit=_STEP):
            read = rows[-1].stream_id
            for row in rows:
                if (
                    row.deliverable
                    and row.sender in senders
                    and row.room_id in room_ids
                    and after.of(row.instance_name) < row.stream_id <= up_to.of(row.instance_name)
                ):
                    yield row.stream_id, row.room_id, row.event_id
            if len(rows) < _STEP:
                break
