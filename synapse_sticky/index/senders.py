"""What the index has of some senders."""

from collections.abc import Collection

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.position import Position
from synapse_sticky.index.follower import IndexFollower

_STEP = 500
"""So many events or rooms are looked at before others have their turn (H3)."""


class EventsOfSenders:
    """Looks through whole rooms: for what happens rarely."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower) -> None:
        self._homeserver = homeserver
        self._follower = follower

    async def find(
        self, senders: Collection[str], room_ids: Collection[str], up_to: Position
    ) -> dict[str, list[str]]:
        """By room, the IDs of the senders' unexpired events up to a position of the sticky events
        stream, in stream order. The index may lag."""
        found: dict[str, list[str]] = {}
        seen = 0
        for room_id in [*room_ids]:
            index, now_ms = self._follower.index, self._homeserver.now_ms()
            rows = index.events_in_rooms(
                [room_id], 0, {}, up_to.stream_id, up_to.writers, now_ms, None
            )
            of_them = [e for _, _, e in rows if (row := index.get(e)) and row[3] in senders]
            if of_them:
                found[room_id] = of_them
            seen += len(rows) + 1
            if seen >= _STEP:
                seen = 0
                await self._homeserver.give_way()
        return found
