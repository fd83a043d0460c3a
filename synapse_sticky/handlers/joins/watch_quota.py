"""How many newcomers of a room are watched: strangers choose how many servers join (H1)."""

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_MOST_ROOMS = 10_000


@attr.s(auto_attribs=True, slots=True)
class _Hour:
    begin_ms: int
    count: int = 0


class WatchQuota:
    """Counts the newcomers of each room, an hour at a time. In memory only."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: how many newcomers of a room are watched that join within an hour.
        """
        self._most = most
        self._hours: dict[str, _Hour] = {}

    def admit(self, room_id: str, now_ms: int) -> bool:
        """One more newcomer: is it watched?"""
        hour = self._hours.pop(room_id, None)
        if hour is None or not 0 <= now_ms - hour.begin_ms < MAX_STICKY_DURATION_MS:
            hour = _Hour(now_ms)
        self._hours[room_id] = hour
        if len(self._hours) > _MOST_ROOMS:
            del self._hours[next(iter(self._hours))]
        hour.count += 1
        if hour.count == self._most + 1:
            logger.warning(
                "More than %d servers have joined %s within an hour: the others are pushed its"
                " sticky events, and their acknowledgements suffice",
                self._most,
                room_id,
            )
        return hour.count <= self._most
