"""Users all of whose events were redacted at once, which the index has yet to look for (S5)."""

from collections.abc import Awaitable, Callable, Sequence

from synapse_sticky._core import StickyIndex
from synapse_sticky.index.stream import Stream

_STEP = 500
"""So many events are looked at before others have their turn (H3)."""


class Redacted:
    """Pairs of a room ID, empty for all rooms, and of a user ID: as many as were told of since the
    last look."""

    def __init__(self, stream: Stream, give_way: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._give_way = give_way
        # How often each was told of: what comes once more meanwhile is looked for once more.
        self._pairs: dict[tuple[str, str], int] = {}

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def add(self, room_id: str, user_id: str) -> None:
        pair = room_id, user_id
        self._pairs[pair] = self._pairs.get(pair, 0) + 1

    def concern(self, row: tuple[int, str, str, str, int] | None) -> bool:
        """May this row of the index be redacted, as nobody has looked for it yet?"""
        if row is None or not self._pairs:
            return False
        _, room_id, _, user_id, _ = row
        return (room_id, user_id) in self._pairs or ("", user_id) in self._pairs

    async def look_for(
        self, index: StickyIndex, events_of: Callable[[str], Sequence[str]], changed: set[str]
    ) -> None:
        """Adds these users' events to those that have changed: by one look through each room,
        however many were banned there."""
        while self._pairs:
            told = dict(self._pairs)
            by_room: dict[str, set[str]] = {}
            for room_id, user_id in told:
                for of_room in [room_id] if room_id else await self._stream.rooms_of(user_id):
                    by_room.setdefault(of_room, set()).add(user_id)
            for of_room, users in by_room.items():
                for number, event_id in enumerate(events_of(of_room)):
                    if number % _STEP == _STEP - 1:
                        await self._give_way()
                    if (row := index.get(event_id)) is not None and row[3] in users:
                        changed.add(event_id)
            # Until now each was in doubt. If anything fails, it is looked for again.
            for pair, times in told.items():
                if self._pairs[pair] == times:
                    del self._pairs[pair]
