"""Joined servers see unexpired sticky events whole, whatever the history visibility (C1).

Fails closed: if it cannot be decided, history visibility stays as it is.
"""

from collections.abc import Sequence
from typing import Protocol

from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower


class _Event(Protocol):
    @property
    def event_id(self) -> str: ...
    @property
    def room_id(self) -> str: ...
    @property
    def sender(self) -> str: ...


class VisibilityHandler:
    """Decides which hidden events a server may see after all."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower) -> None:
        self._hs = homeserver
        self._follower = follower

    def start(self) -> None:
        """Takes effect from the next event on that is filtered for a server."""
        self._hs.visibility.allow_servers(self.allowed)

    async def allowed(self, server: str, events: Sequence[_Event]) -> set[str]:
        """The event IDs that the server may see: sticky, unexpired, not soft-failed, redacted or
        of an erased user (P6), in a room that the server is joined to now."""
        if server == self._hs.server_name:
            return set()
        now_ms = self._hs.now_ms()
        rows = await self._follower.rows_of([event.event_id for event in events])
        sticky = [
            event
            for event in events
            if (row := rows.get(event.event_id)) is not None and now_ms < row.expires_at_ms
        ]
        if not sticky:
            return set()
        joined = {
            room_id
            for room_id in {event.room_id for event in sticky}
            if await self._hs.rooms.is_joined(room_id, server)
        }
        erased = await self._hs.rooms.erased({event.sender for event in sticky})
        return {e.event_id for e in sticky if e.room_id in joined and e.sender not in erased}
