"""Bringing down the forward extremities that old sticky events leave (F2).

Synapse itself sends one dummy event to each of five rooms every five minutes. A flood leaves
hundreds of extremities. Fails open: Synapse merges what this duty does not.
"""

from collections import deque
from collections.abc import Callable, Collection
from typing import Protocol

from synapse_sticky.apart import Stragglers
from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.config import ExtremitiesConfig
from synapse_sticky.handlers.extremities.senders import DummyEvents, Senders
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.causes import is_outage
from synapse_sticky.index import IndexFollower
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_ROUND_MS = 5_000
_MINUTE_MS = 60_000
_MAX_ROOMS = 1_000
"""While so many rooms are dirty, this duty ignores others; while it is half of that, those where
nobody could send. So they never take all places, whatever changes in them."""
_BACKOFF = Backoff(5_000, 600_000)

_MAX_FAILURES = 50
"""So many rooms of a round may fail, most of them because nobody in them can send. They use up no
dummy events: those are for the others. As the rooms take turns, the ones that fail delay another by
100 s at most (``_MAX_ROOMS / _MAX_FAILURES`` rounds)."""


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
        self._senders = Senders(homeserver, extremities)
        self._per_round = max(1, config.per_minute * _ROUND_MS // _MINUTE_MS)
        # In the order in which the rooms have their turn.
        self._dirty: dict[str, None] = {}
        self._events_left = 0
        self._failures_left = 0
        self._rounds = Retrying(
            homeserver,
            "merge_extremities",
            "Could not merge forward extremities",
            homeserver.metrics.timed("extremities", "round", self._run_round),
            _BACKOFF,
        )
        self._alarm = Alarm(homeserver, "merge_extremities", self._rounds.run)
        self._stragglers: Stragglers[str] = Stragglers(
            homeserver,
            "merge_extremities_of_one",
            "Could not merge the forward extremities of",
            self._try_again,
            _BACKOFF,
            _MAX_ROOMS,
        )

    def install(self) -> None:
        """Takes effect from the next sticky event of a room on."""
        self._follower.on_new_events(self._add)
        self._extremities.on_state_changed(self._state_changed)

    def _add(self, room_ids: Collection[str]) -> None:
        for room_id in room_ids:
            is_to_wait = room_id in self._stragglers or self._senders.is_left_out(room_id)
            most = _MAX_ROOMS // 2 if self._senders.has_failed(room_id) else _MAX_ROOMS
            if len(self._dirty) < most and not is_to_wait:
                self._dirty[room_id] = None
        self._schedule()

    def _state_changed(self, room_id: str) -> None:
        if self._senders.doubt(room_id):
            self._add([room_id])

    def _schedule(self) -> None:
        # After a round, or the delay that follows a failure, comes the next one by itself.
        if self._dirty and not self._rounds.is_running and not self._rounds.is_failing:
            self._alarm.ring_in(_ROUND_MS)

    async def _run_round(self) -> None:
        rooms = deque(self._dirty)
        self._dirty.clear()
        # Rooms that were tried by themselves since may have had some of it already.
        self._events_left = self._per_round + min(self._events_left, 0)
        self._failures_left = _MAX_FAILURES
        try:
            while rooms and self._failures_left > 0 and self._events_left > 0:
                await self._bring_down_by_itself(rooms[0])
                if self._events_left > 0:
                    rooms.popleft()
                else:
                    # The room that used the round up comes last in the next one.
                    rooms.rotate(-1)
        except Exception:
            # Likewise the one that failed with the database.
            rooms.rotate(-1)
            raise
        finally:
            next_rooms = [*rooms, *self._dirty]
            self._dirty = dict.fromkeys(r for r in next_rooms if r not in self._stragglers)
        if self._dirty:
            self._alarm.ring_in(_ROUND_MS)

    async def _bring_down_by_itself(self, room_id: str) -> None:
        """Does as ``_bring_down``; a room that fails is tried again by itself.

        Raises:
            Exception: the database is away.
        """
        try:
            await self._bring_down(room_id, self._events_left)
        except Exception as e:
            if is_outage(e):
                raise
            self._failures_left -= 1
            self._stragglers.add([(room_id, e)])

    async def _try_again(self, room_id: str) -> None:
        # Once the fault is gone many are tried at a time. They send what a round sends, no more.
        if self._events_left > -self._per_round:
            await self._bring_down(room_id, 1)
        # If this went well, the room has its turn among the others.
        self._dirty[room_id] = None
        self._schedule()

    async def _bring_down(self, room_id: str, at_most: int) -> None:
        """Sends at most so many dummy events, until the room has few enough extremities."""
        extremities = self._extremities
        sent = 0
        while sent < at_most and await extremities.count(room_id) > extremities.threshold:
            if not await self._senders.send(room_id):
                self._failures_left -= 1
                break
            sent += 1
            self._events_left -= 1
            self._homeserver.metrics.merged()
        if sent:
            logger.info(
                "Sent %d dummy events to %s: it has %d forward extremities",
                sent,
                room_id,
                await extremities.count(room_id),
            )
