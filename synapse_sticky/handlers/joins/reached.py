"""Destinations that can be reached again after a back-off (H7): what they lack goes out at once,
and not when it would have been tried next.

Synapse cannot catch up with a destination that it has never sent an event to (P2): what it has in
memory for it is gone with a restart, or after a back-off of more than an hour. So for such a one,
too, what is sticky enters the backlog.
"""

from synapse_sticky.apart import each
from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.joins.confirmation.confirmation import Confirmation
from synapse_sticky.handlers.joins.destinations import Destinations
from synapse_sticky.handlers.joins.federation import Federation
from synapse_sticky.homeserver import Homeserver

_BACKOFF = Backoff(1_000, 60_000)

_STEP = 20
"""So many pushes are looked at before others have their turn (H3)."""


class Reached:
    """Sends on what waits for such a destination."""

    def __init__(
        self,
        homeserver: Homeserver,
        federation: Federation,
        destinations: Destinations,
        confirmation: Confirmation,
    ) -> None:
        self._homeserver = homeserver
        self._federation = federation
        self._destinations = destinations
        self._confirmation = confirmation
        self._reached: dict[str, None] = {}
        self._looking = Retrying(
            homeserver,
            "send_on",
            "Could not look after who can be reached again",
            self._look,
            _BACKOFF,
        )

    def note(self, destination: str) -> None:
        """The destination was backed off, and has answered or asked something."""
        if self._federation.handles(destination):
            self._reached[destination] = None
            self._looking.wake()

    async def _look(self) -> None:
        # One after the other: after an outage of this server they are many.
        await each(self._reached, self._send_on)

    async def _send_on(self, destination: str) -> None:
        await self._federation.add_if_never_reached(destination)
        self._destinations.note_backlog(destination, has_backlog=True)
        self._destinations.check_soon(destination)
        self._confirmation.reachable(destination)
        for number, push in enumerate(self._destinations.pushes_of(destination), 1):
            if self._destinations.is_current(push):
                push.try_now(self._homeserver.now_ms())
                self._confirmation.hasten(push)
                self._destinations.look_now(push)
            if number % _STEP == 0:
                await self._homeserver.give_way()
        self._destinations.schedule(destination)
        self._federation.wake(destination)
