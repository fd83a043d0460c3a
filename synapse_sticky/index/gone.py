"""Rows of Synapse's table whose events were purged (S2).

A purge leaves them. Their events are shown to nobody, but Synapse goes through the rows until they
expire.
"""

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index.stream import Stream

_BACKOFF = Backoff(5_000, 600_000)


class GoneRows:
    """Deletes them, in the main process."""

    def __init__(self, homeserver: Homeserver, stream: Stream) -> None:
        self._is_main = homeserver.place.is_main
        self._stream = stream
        # Synapse purges a room after the other.
        self._rooms: set[str] = set()
        self._deleting = Retrying(
            homeserver,
            "forget_gone",
            "Could not delete rows without events",
            self._delete,
            _BACKOFF,
        )

    def install(self) -> None:
        """Takes effect from the next purge on, in the main process."""
        if self._is_main:
            self._stream.on_room_purged(self._purged)

    def _purged(self, room_id: str) -> None:
        self._rooms.add(room_id)
        self._deleting.wake()

    async def _delete(self) -> None:
        while self._rooms:
            room_id = next(iter(self._rooms))
            # A purge that comes meanwhile counts.
            self._rooms.remove(room_id)
            try:
                await self._stream.forget_gone(room_id)
            except Exception:
                self._rooms.add(room_id)
                raise
