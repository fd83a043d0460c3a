"""Who is joined sees unexpired sticky events whole, whatever the history visibility (C1).

Fails closed: if it cannot be decided, history visibility stays as it is. For all others Synapse's
rules hold, neither widened nor narrowed (D8).
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import attr

from synapse_sticky._core import sticky_until_ms
from synapse_sticky.config import VisibilityConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower

if TYPE_CHECKING:
    from synapse_sticky.homeserver.retention import Retention
    from synapse_sticky.homeserver.rooms import Rooms


@attr.s(auto_attribs=True, frozen=True, slots=True)
class HiddenEvent:
    """An event with the sticky field that history visibility hides.

    sticky_field: the value of that field.
    origin_server_ts: when its sender's server says it was sent, in ms.
    """

    event_id: str
    room_id: str
    sender: str
    sticky_field: object
    origin_server_ts: int


Allowed = Callable[[str, Sequence[HiddenEvent]], Awaitable[set[str]]]
"""A server's name or a user's ID, and what is hidden from it, to the IDs of the events that it may
see all the same."""


class Visibility(Protocol):
    """What history visibility hides from servers and users."""

    def allow(self, *, servers: Allowed | None, users: Allowed | None) -> None:
        """From now on shows what these allow, on every endpoint. None adds nothing.

        Users get nothing of senders whom they ignore (D6) and nothing soft-failed. One that fails
        adds nothing either.

        Raises:
            SeamMismatchError: not all endpoints could be served. None is.
        """


class VisibilityHandler:
    """Decides which hidden events a server or a user may see after all."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        follower: IndexFollower,
        visibility: Visibility,
        retention: "Retention",
        config: VisibilityConfig,
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._follower = follower
        self._visibility = visibility
        self._config = config
        self._retention = retention

    def install(self) -> None:
        """Takes effect from the next event on that is filtered.

        Raises:
            SeamMismatchError: see ``Visibility.allow``.
        """
        timed = self._homeserver.metrics.timed
        servers = timed("visibility", "servers", self.allowed_to_server)
        users = timed("visibility", "users", self.allowed_to_user)
        self._visibility.allow(
            servers=servers if self._config.servers else None,
            users=users if self._config.users else None,
        )

    async def allowed_to_server(self, server: str, events: Sequence[HiddenEvent]) -> set[str]:
        """The IDs of the events that the server may see: unexpired, not of an erased user (P6), in
        a room that the server is joined to now.

        Soft-failed and deferred ones, too: a server takes the first copy that it gets of an event
        for the last, and one that is hidden from it comes without what makes it sticky.
        """
        if server == self._homeserver.server_name:
            return set()
        rows = await self._follower.rows_of([event.event_id for event in events])
        now_ms = self._homeserver.now_ms()
        sticky = [
            event
            for event in events
            if (
                now_ms < row.expires_at_ms
                if (row := rows.get(event.event_id)) is not None
                else await self._is_sticky_by_its_claims(event, now_ms)
            )
        ]
        return await self._of_those_joined(self._rooms.is_joined, server, sticky)

    async def allowed_to_user(self, user_id: str, events: Sequence[HiddenEvent]) -> set[str]:
        """The IDs of the events that the local user may see, by the same rules; but none that are
        soft-failed or deferred."""
        rows = await self._follower.rows_of([event.event_id for event in events])
        now_ms = self._homeserver.now_ms()
        sticky = [
            event
            for event in events
            if (row := rows.get(event.event_id)) is not None and now_ms < row.expires_at_ms
        ]
        return await self._of_those_joined(self._rooms.is_user_joined, user_id, sticky)

    async def _of_those_joined(
        self,
        is_joined: Callable[[str, str], Awaitable[bool]],
        who: str,
        sticky: Sequence[HiddenEvent],
    ) -> set[str]:
        if not sticky:
            return set()
        joined = {
            room_id
            for room_id in {event.room_id for event in sticky}
            if await is_joined(room_id, who)
        }
        erased = await self._rooms.erased({event.sender for event in sticky})
        return {e.event_id for e in sticky if e.room_id in joined and e.sender not in erased}

    async def _is_sticky_by_its_claims(self, event: HiddenEvent, now_ms: int) -> bool:
        """Is the event sticky, if it was sent when it says? One from the future is not: when it was
        received is not known here, so that it would stay sticky until then."""
        sent_ms = event.origin_server_ts
        if sent_ms > now_ms:
            return False
        until_ms = sticky_until_ms(event.sticky_field, sent_ms, now_ms)
        if until_ms is None or until_ms <= now_ms:
            return False
        return now_ms < await self._retention.ends_ms(event.room_id, until_ms, sent_ms)
