"""The time that Synapse's ordinary queue has for a new own event, before newcomers are looked at.

It is one time for all newcomers of a room. When it is over, they are looked at in steps, so that
nothing else waits for all of them (H3).
"""

from collections import deque
from collections.abc import Callable, Iterable

from synapse_sticky.backoff import Alarm
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.handlers.joins.sent import GRACE_MS
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

STEP = 5
"""After this many pushes that took work, whatever else is due has its turn."""


class Grace:
    """Looks at a room's pushes once the ordinary queue has had its time for a new event."""

    def __init__(
        self, homeserver: Homeserver, rooms: PushedRooms, look: Callable[[Push], bool]
    ) -> None:
        """
        Args:
            look: is called with each push of the room; gives whether that took some work.
        """
        self._homeserver = homeserver
        self._rooms = rooms
        self._look = look
        self._alarm = Alarm(homeserver, "look_at_newcomers", self._over)
        self._ends: deque[tuple[int, str]] = deque()
        self._is_looking = False

    def begin(self, room_ids: Iterable[str]) -> None:
        """There are new own events in these rooms."""
        end_ms = self._homeserver.steady_ms() + GRACE_MS
        self._ends += [(end_ms, room_id) for room_id in room_ids]
        self._ring()

    def _ring(self) -> None:
        if self._ends and not self._is_looking:
            in_ms = self._ends[0][0] - self._homeserver.steady_ms()
            self._alarm.ring_in(max(in_ms, 0) + 1)

    async def _over(self) -> None:
        if self._is_looking:
            return  # it rings again after that
        self._is_looking = True
        try:
            for room_id in self._due():
                await self._look_at(room_id)
        finally:
            self._is_looking = False
            self._ring()

    def _due(self) -> dict[str, None]:
        """The rooms whose time is over, each once."""
        now_ms = self._homeserver.steady_ms()
        found: dict[str, None] = {}
        while self._ends and self._ends[0][0] <= now_ms:
            found[self._ends.popleft()[1]] = None
        return found

    async def _look_at(self, room_id: str) -> None:
        looked = 0
        for number, push in enumerate(self._rooms.for_new_events(room_id), 1):
            try:
                looked += self._look(push)
            except Exception:
                logger.exception("Could not look at what %s lacks of %s", push.destination, room_id)
                looked += 1
            # A push that needs no work costs about a hundredth of one that does.
            if looked < STEP and number % (100 * STEP):
                continue
            looked = 0
            await self._homeserver.give_way()
            if not self._rooms.is_whole:
                break
        if not self._rooms.is_whole:
            self.begin([room_id])  # the index is made anew: the rest is looked at later
