"""Users all of whose events were redacted at once, which the index has yet to look for (S5)."""

from collections.abc import Callable

from synapse_sticky.index.stream import Stream


class Redacted:
    """Pairs of a room ID, empty for all rooms, and of a user ID."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._pairs: set[tuple[str, str]] = set()

    def __bool__(self) -> bool:
        return bool(self._pairs)

    def add(self, room_id: str, user_id: str) -> None:
        self._pairs.add((room_id, user_id))

    async def look_for(self, tell: Callable[[str, str], None]) -> None:
        """Tells of each room, and of the user whose events there are to be looked up anew."""
        while self._pairs:
            # Out before it is looked for, as it may come once more meanwhile.
            room_id, user_id = pair = self._pairs.pop()
            try:
                rooms = [room_id] if room_id else await self._stream.rooms_of(user_id)
            except Exception:
                self._pairs.add(pair)
                raise
            for of_room in rooms:
                tell(of_room, user_id)
