"""Which rooms' rows are read anew, as their events are kept for another time now (S2).

Whoever sets a room's policy may do so as often as they like, and reading all of its rows may take a
while. So each room is read once in a while only.
"""

from collections.abc import Callable, Collection

from synapse_sticky._core import StickyIndex
from synapse_sticky.index.stream import StickyRow, Stream

_PAGE = 500


class Rereads:
    """Rooms to be read now; each once between two ticks, however often that is asked for.

    due: their IDs.
    """

    def __init__(self) -> None:
        self.due: set[str] = set()
        self._later: set[str] = set()
        self._recent: set[str] = set()

    def add(self, room_id: str) -> None:
        """The room is due; if it was since the last tick, it is once more after the next."""
        (self._later if room_id in self._recent else self.due).add(room_id)
        self._recent.add(room_id)

    def tick(self) -> None:
        """Some time has passed."""
        self.due |= self._later
        self._recent = self._later
        self._later = set()

    async def read(
        self,
        stream: Stream,
        index: StickyIndex,
        insert: Callable[[Collection[StickyRow]], None],
    ) -> None:
        """Has the index take in when the events of a room that is due end, and those that had ended
        and do not any more. One room at a time, as others' new rows wait for it. A room that cannot
        be read stays due."""
        if not self.due:
            return
        room_id, after = next(iter(self.due)), 0
        while rows := await stream.rows_in_room(room_id, after=after, limit=_PAGE):
            for row in rows:
                if (known := index.get(row.event_id)) and known[4] != row.expires_at_ms:
                    index.remove(row.event_id)
            insert(rows)
            after = rows[-1].stream_id
        self.due.discard(room_id)
