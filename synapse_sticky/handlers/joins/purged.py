"""Newcomers of a room that was deleted here: nothing is left to push, and none has a row (H3)."""

from typing import TYPE_CHECKING

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.tables import NewcomerTable
from synapse_sticky.homeserver import Homeserver

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

_BACKOFF = Backoff(1_000, 60_000)


class PurgedRooms:
    """Forgets the newcomers of purged rooms that this server is not in any more."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        pushed: PushedRooms,
        destinations: Destinations,
        table: NewcomerTable,
    ) -> None:
        self._rooms = rooms
        self._pushed = pushed
        self._destinations = destinations
        self._table = table
        self._purged: set[str] = set()
        self._forgetting = Retrying(
            homeserver,
            "forget_rooms",
            "Could not forget the newcomers of purged rooms",
            self._forget,
            _BACKOFF,
        )

    def note(self, room_id: str) -> None:
        """Events of the room are gone; all of them, or some."""
        self._purged.add(room_id)
        self._forgetting.wake()

    async def _forget(self) -> None:
        while self._purged:
            # Out before it is looked at, as it may be purged again meanwhile.
            room_id = self._purged.pop()
            try:
                if await self._rooms.is_in_room(room_id):
                    continue  # a purge of its history only
                await self._table.forget_room(room_id)
            except Exception:
                self._purged.add(room_id)
                raise
            for push in self._pushed.pushes(room_id):
                self._destinations.remove(push)
