"""Bringing down the forward extremities that old sticky events leave (F2).

Synapse itself sends one dummy event to each of five rooms every five minutes. A flood leaves
hundreds of extremities. Fails open: Synapse merges what this duty does not.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from synapse_sticky.config import ExtremitiesConfig
from synapse_sticky.handlers.extremities.senders import DummyEvents, Senders
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.index import IndexFollower

logger = logging.getLogger(__name__)

_ROUND_MS = 5_000
_MINUTE_MS = 60_000
_MAX_ROOMS = 1_000
"""While so many rooms are dirty, this duty ignores others."""

_MAX_FAILURES = 50
"""In so many rooms of a round there may be nobody who can send."""


class Extremities(DummyEvents, Protocol):
    """The forward extremities of rooms.

    threshold: how many a room may have.
    """

    threshold: int

    async def count(self, room_id: str) -> int:
        """How many the room has."""

    def on_state_changed(self, callback: Callable[[str], None]) -> None:
        """Calls back with the ID of each room whose current state has changed, in any way."""


class ExtremitiesHandler:
    """Sends dummy events to rooms with new sticky events and too many forward extremities."""

    def __init__(
        self,
        homeserver: Homeserver,
        extremities: Extremities,
        follower: IndexFollower,
        config: ExtremitiesConfig,
    ) -> None:
        self._homeserver = homeserver
        self._extremities = extremities
        self._follower = follower
        self._senders = Senders(homeserver.now_ms, extremities)
        self._per_round = max(1, config.per_minute * _ROUND_MS // _MINUTE_MS)
        # In the order in which the rooms have their turn.
        self._dirty: dict[str, None] = {}
        self._is_scheduled = False
        self._failures_left = 0

    def install(self) -> None:
        """Takes effect from the next sticky event of a room on."""
        self._follower.on_new_events(self._add)
        self._extremities.on_state_changed(self._state_changed)

    def _add(self, room_ids: Collection[str]) -> None:
        for room_id in room_ids:
            if len(self._dirty) < _MAX_ROOMS and not self._senders.is_left_out(room_id):
                self._dirty[room_id] = None
        self._schedule()

    def _state_changed(self, room_id: str) -> None:
        if self._senders.doubt(room_id):
            self._add([room_id])

    def _schedule(self) -> None:
        if self._dirty and not self._is_scheduled:
            self._is_scheduled = True
            self._homeserver.call_later(_ROUND_MS, "merge_extremities", self._run_round)

    async def _run_round(self) -> None:
        rooms = deque(self._dirty)
        self._dirty.clear()
        left = self._per_round
        self._failures_left = _MAX_FAILURES
        try:
            while rooms and self._failures_left:
                left -= await self._bring_down(rooms[0], left)
                if left == 0:
                    # The room that used the round up comes last in the next one.
                    rooms.rotate(-1)
                    break
                rooms.popleft()
            self._dirty = dict.fromkeys([*rooms, *self._dirty])
        except Exception:
            logger.exception("Could not merge forward extremities, leaving them to Synapse")
        finally:
            self._is_scheduled = False
            self._schedule()

    async def _bring_down(self, room_id: str, at_most: int) -> int:
        """Sends at most so many dummy events, until the room has few enough extremities.

        Returns:
            How many it sent.
        """
        extremities = self._extremities
        sent = 0
        while sent < at_most and await extremities.count(room_id) > extremities.threshold:
            if not await self._senders.send(room_id):
                self._failures_left -= 1
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
