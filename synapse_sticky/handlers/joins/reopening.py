"""What was held back and may go out now (H7): a room's ACL has changed, or this server is in the
room again. Whoever an ACL still denies costs no look at the database (H3).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from synapse_sticky.apart import each
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.confirmation.confirmation import Confirmation
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.homeserver import Homeserver

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

_BACKOFF = Backoff(1_000, 60_000)

_STEP = 20
"""So many pushes are looked at before others have their turn (H3)."""


class Reopening:
    """Sends on what is blocked, or was refused, once the room's state allows it."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        federation: Federation,
        pushed: PushedRooms,
        destinations: Destinations,
        confirmation: Confirmation,
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._federation = federation
        self._pushed = pushed
        self._destinations = destinations
        self._confirmation = confirmation
        self._changed: dict[str, None] = {}
        self._looking = Retrying(
            homeserver,
            "reopen_rooms",
            "Could not look after what may go out again",
            self._look,
            _BACKOFF,
        )

    def note(self, room_ids: Iterable[str]) -> None:
        """The ACL of these rooms has changed, or this server has joined them."""
        # Rooms that nothing is pushed of are of no interest, so the others bound this.
        self._changed.update((r, None) for r in room_ids if self._pushed.pushes(r))
        if self._changed:
            self._looking.wake()

    async def _look(self) -> None:
        await each(self._changed, self._look_at)

    async def _look_at(self, room_id: str) -> None:
        held = [p for p in self._pushed.pushes(room_id) if p.is_blocked or p.is_refused]
        if not held or not await self._rooms.is_in_room(room_id):
            return
        allows = await self._rooms.acl_now(room_id)
        if not allows(self._homeserver.server_name):
            return
        for number, push in enumerate(held, 1):
            if allows(push.destination) and self._destinations.is_current(push):
                push.is_blocked = False
                push.try_now(self._homeserver.now_ms(), is_sent=False)
                self._confirmation.hasten(push)
                self._destinations.check_soon(push.destination)
                self._destinations.look_now(push)
                self._destinations.schedule(push.destination)
                self._federation.wake(push.destination)
            if number % _STEP == 0:
                await self._homeserver.give_way()
