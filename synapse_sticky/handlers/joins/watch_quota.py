"""How many newcomers of a room are watched: strangers choose how many servers join (H1)."""

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_MOST_REMEMBERED = 100_000
_MOST_ROOMS = 10_000
"""Newcomers, and rooms. Past either, the room is forgotten that has had no newcomer for longest."""


@attr.s(auto_attribs=True, slots=True)
class _Hour:
    begin_ms: int
    admitted: set[str] = attr.Factory(set)
    is_full: bool = False


class WatchQuota:
    """Counts the servers that join each room, an hour at a time. In memory only."""

    def __init__(self, most: int) -> None:
        """
        Args:
            most: how many newcomers of a room are watched that join within an hour.
        """
        self._most = most
        self._hours: dict[str, _Hour] = {}
        self._remembered = 0

    def admit(self, room_id: str, destination: str, now_ms: int) -> bool:
        """A newcomer has joined: is it watched? A server that joins again and again is one."""
        hour = self._hours.pop(room_id, None)
        if hour is not None and not 0 <= now_ms - hour.begin_ms < MAX_STICKY_DURATION_MS:
            self._remembered -= len(hour.admitted)
            hour = None
        self._hours[room_id] = hour = hour or _Hour(now_ms)
        self._forget_some()
        if destination in hour.admitted:
            return True
        if len(hour.admitted) < self._most:
            hour.admitted.add(destination)
            self._remembered += 1
            return True
        if not hour.is_full:
            hour.is_full = True
            logger.warning(
                "More than %d servers have joined %s within an hour: the others are pushed its"
                " sticky events, and their acknowledgements suffice",
                self._most,
                room_id,
            )
        return False

    def _forget_some(self) -> None:
        while self._remembered > _MOST_REMEMBERED or len(self._hours) > _MOST_ROOMS:
            longest_ago = next(iter(self._hours))
            self._remembered -= len(self._hours.pop(longest_ago).admitted)
