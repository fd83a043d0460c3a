"""Bringing down the forward extremities that old sticky events leave (F2).

Synapse does so for any room, five rooms every five minutes and one event each; a flood leaves
hundreds. Fails open: what is not merged here is left to Synapse.
"""

import logging
from collections import deque
from collections.abc import Collection

from synapse_sticky.config import DummyEventsConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower

logger = logging.getLogger(__name__)

_ROUND_MS = 5_000
_MINUTE_MS = 60_000
_MAX_ROOMS = 1_000
"""More rooms than these are not looked at, until there are fewer."""


class ExtremitiesHandler:
    """Sends dummy events into rooms with new sticky events and too many forward extremities."""

    def __init__(
        self, homeserver: Homeserver, follower: IndexFollower, config: DummyEventsConfig
    ) -> None:
        self._hs = homeserver
        self._follower = follower
        self._per_round = max(1, config.per_minute * _ROUND_MS // _MINUTE_MS)
        self._rooms: dict[str, None] = {}
        self._scheduled = False

    def start(self) -> None:
        """Looks at rooms from their next sticky event on."""
        self._follower.on_new_events(self._note)

    def _note(self, room_ids: Collection[str]) -> None:
        for room_id in room_ids:
            if len(self._rooms) < _MAX_ROOMS:
                self._rooms[room_id] = None
        self._schedule()

    def _schedule(self) -> None:
        if self._rooms and not self._scheduled:
            self._scheduled = True
            self._hs.call_later(_ROUND_MS, "merge_extremities", self._round)

    async def _round(self) -> None:
        rooms = deque(self._rooms)
        self._rooms.clear()
        left = self._per_round
        try:
            while rooms:
                left -= await self._bring_down(rooms[0], left)
                if left == 0:
                    break
                rooms.popleft()
            # The room that used the round up comes last in the next one.
            rooms.rotate(-1)
            self._rooms = dict.fromkeys([*rooms, *self._rooms])
        except Exception:
            logger.exception("Could not bring forward extremities down, leaving it to Synapse")
        finally:
            self._scheduled = False
            self._schedule()

    async def _bring_down(self, room_id: str, at_most: int) -> int:
        """Sends dummy events until there are few enough. Gives how many it sent."""
        extremities = self._hs.extremities
        sent = 0
        while sent < at_most and await extremities.count(room_id) > extremities.threshold:
            if not await extremities.merge(room_id):
                logger.info("Nobody here can send a dummy event to %s", room_id)
                break
            sent += 1
        if sent:
            logger.info(
                "Sent %d dummy events to %s: it has %d forward extremities",
                sent,
                room_id,
                await extremities.count(room_id),
            )
        return sent
