"""Who is joined sees unexpired sticky events whole, whatever the history visibility (C1).

Fails closed: if it cannot be decided, history visibility stays as it is.
"""

from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Protocol

from synapse_sticky.config import VisibilityConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower


class _Event(Protocol):
    @property
    def event_id(self) -> str: ...
    @property
    def room_id(self) -> str: ...
    @property
    def sender(self) -> str: ...
    @property
    def origin_server_ts(self) -> int: ...
    def sticky_duration(self) -> timedelta | None: ...


class VisibilityHandler:
    """Decides which hidden events a server or a user may see after all."""

    def __init__(self, homeserver: Homeserver, follower: IndexFollower) -> None:
        self._hs = homeserver
        self._follower = follower

    def start(self, config: VisibilityConfig) -> None:
        """Takes effect from the next event on that is filtered."""
        self._hs.visibility.hide_from_users(self.hidden_from_user)
        if config.servers:
            self._hs.visibility.allow_servers(self.allowed)
        if config.users:
            self._hs.visibility.allow_users(self.allowed_to_user)

    async def allowed(self, server: str, events: Sequence[_Event]) -> set[str]:
        """The event IDs that the server may see: sticky, unexpired, not rejected, redacted or
        of an erased user (P6), in a room that the server is joined to now.

        Soft-failed and deferred ones, too: a server takes the first copy that it gets of an event
        for the last, and one that is hidden from it comes without what makes it sticky.
        """
        if server == self._hs.server_name:
            return set()
        rows = await self._follower.rows_of([event.event_id for event in events])
        now_ms = self._hs.now_ms()
        sticky = [
            event
            for event in events
            if (
                now_ms < rows[event.event_id].expires_at_ms
                if event.event_id in rows
                else event.origin_server_ts <= now_ms < _claimed_end_ms(event)
            )
        ]
        return await self._of_those_joined(self._hs.rooms.is_joined, server, sticky)

    async def allowed_to_user(self, user_id: str, events: Sequence[_Event]) -> set[str]:
        """The event IDs that the local user may see, by the same rules; but none that are
        soft-failed or deferred."""
        now_ms = self._hs.now_ms()
        rows = await self._follower.rows_of([event.event_id for event in events])
        sticky = [
            event
            for event in events
            if (row := rows.get(event.event_id)) is not None and now_ms < row.expires_at_ms
        ]
        return await self._of_those_joined(self._hs.rooms.is_user_joined, user_id, sticky)

    async def hidden_from_user(self, user_id: str, events: Sequence[_Event]) -> set[str]:
        """The event IDs that the local user may not see, as they are not joined to the room and
        the event is still sticky (D8).

        Whether it is expired goes by what its sender says: a claim from the future keeps it from
        outsiders for longer, but from nobody else.
        """
        now_ms = self._hs.now_ms()
        hidden = set()
        for event in events:
            if now_ms >= _claimed_end_ms(event):
                continue
            if not await self._hs.rooms.is_user_joined(event.room_id, user_id):
                hidden.add(event.event_id)
        return hidden

    async def _of_those_joined(
        self,
        is_joined: Callable[[str, str], Awaitable[bool]],
        who: str,
        sticky: Sequence[_Event],
    ) -> set[str]:
        if not sticky:
            return set()
        joined = {
            room_id
            for room_id in {event.room_id for event in sticky}
            if await is_joined(room_id, who)
        }
        erased = await self._hs.rooms.erased({event.sender for event in sticky})
        return {e.event_id for e in sticky if e.room_id in joined and e.sender not in erased}


def _claimed_end_ms(event: _Event) -> float:
    """When the event expires, if it was sent when it says; 0 if it is not sticky."""
    duration = event.sticky_duration()
    return 0 if duration is None else event.origin_server_ts + duration.total_seconds() * 1000
