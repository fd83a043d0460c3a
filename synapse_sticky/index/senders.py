"""What the index has of some senders."""

import heapq
from collections.abc import Collection

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
        self, senders: Collection[str], room_ids: Collection[str], up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the IDs of the senders' unexpired events up to a position of the sticky events
        stream, in stream order; of more than ``MOST`` the newest. The index may lag."""
        newest: list[tuple[int, str, str]] = []
        seen = 0
        for room_id in [*room_ids]:
            index, now_ms = self._follower.index, self._homeserver.now_ms()
            rows = index.events_in_rooms(
                [room_id], 0, {}, up_to.stream_id, up_to.writers, now_ms, None
            )
            for _, _, event_id in rows:
                row = index.get(event_id)
                if row is None or row[3] not in senders:
                    continue
                heapq.heappush(newest, (row[0], room_id, event_id))
                if len(newest) > MOST:
                    heapq.heappop(newest)
            seen += len(rows) + 1
            if seen >= _STEP:
                seen = 0
                await self._homeserver.give_way()
        found: dict[str, list[str]] = {}
        for _, room_id, event_id in sorted(newest):
            found.setdefault(room_id, []).append(event_id)
        return found
