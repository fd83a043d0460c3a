"""Whose events may have changed all at once, which the index has yet to look for: a room's, as it
was purged, or a user's, as they were redacted (S5)."""

import sys
from collections.abc import Awaitable, Callable

from synapse_sticky._core import StickyIndex
from synapse_sticky.index.stream import Stream

_STEP = 500
"""So many events are looked at before others have their turn (H3)."""


class Doubts:
    """Pairs of a room ID, empty for all rooms, and of a user ID, empty for all users: as many as
    were told of since the last look. Until then the events of each are in doubt.

    pairs: how often each was told of. What comes once more meanwhile is looked for once more.
    """

    def __init__(self, stream: Stream, give_way: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._give_way = give_way
        self.pairs: dict[tuple[str, str], int] = {}

    def add(self, room_id: str, user_id: str) -> None:
        pair = room_id, user_id
        self.pairs[pair] = self.pairs.get(pair, 0) + 1

    def concern(self, row: tuple[int, str, str, str, int] | None) -> bool:
        """May this row of the index have changed, as nobody has looked for it yet?"""
        if row is None or not self.pairs:
            return False
        _, room_id, _, user_id, _ = row
        whose = (room_id, user_id), (room_id, ""), ("", user_id)
        return any(pair in self.pairs for pair in whose)

    async def look_for(self, index: StickyIndex, changed: set[str]) -> None:
        """Adds these events to those that have changed: by one look through each room, whoever was
        told of there."""
        while self.pairs:
            told = dict(self.pairs)
            by_room: dict[str, set[str]] = {}
            for room_id, user_id in told:
                for of_room in [room_id] if room_id else await self._stream.rooms_of(user_id):
                    by_room.setdefault(of_room, set()).add(user_id)
            for room_id, users in by_room.items():
                await self._look_through(index, room_id, users, changed)
            # If anything fails before, it is looked for again.
            for pair, times in told.items():
                if self.pairs[pair] == times:
                    del self.pairs[pair]

    async def _look_through(
        self, index: StickyIndex, room_id: str, users: set[str], changed: set[str]
    ) -> None:
        after, is_of_all = 0, "" in users
        while True:
            page = index.events_in_rooms([room_id], after, {}, sys.maxsize, {}, 0, _STEP)
            for _, _, event_id in page:
                row = None if is_of_all else index.get(event_id)
                if is_of_all or (row is not None and row[3] in users):
                    changed.add(event_id)
            if len(page) < _STEP:
                return
            after = page[-1][0]
            await self._give_way()
