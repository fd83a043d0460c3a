"""What newcomers have from earlier pushes. A server may leave a room and join it again and again:
that must not make every server of the room send everything each time."""

import attr

from synapse_sticky._core import MAX_STICKY_DURATION_MS
from synapse_sticky.backoff import Backoff

MOST_REMEMBERED = 10_000
"""How many destinations and rooms are remembered. One takes some 500 bytes."""

APART = Backoff(5_000, 300_000)
"""The least time between the beginnings of two pushes of a room to a destination."""

_MOST_AHEAD_MS = 2 * APART.max_ms


@attr.s(auto_attribs=True, slots=True)
class _EarlierPush:
    position: int = 0
    count: int = 0
    begun_ms: int = 0
    noted_ms: int = 0


class EarlierPushes:
    """Up to where a destination has what was pushed to it in the last hour.

    It is in memory only. After a restart, everything is pushed once more.
    """

    def __init__(self) -> None:
        self._pushes: dict[tuple[str, str], _EarlierPush] = {}

    def note(self, destination: str, room_id: str, position: int, now_ms: int) -> None:
        """The destination has all own events of the room before ``position``, a position of the
        sticky events stream."""
        push = self._take(destination, room_id, now_ms)
        push.position = max(push.position, position)
        push.noted_ms = now_ms

    def begin(self, destination: str, room_id: str, now_ms: int) -> tuple[int, int]:
        """A new push begins. Gives the position before which it has nothing to send, and when it
        may send (ms since the epoch)."""
        push = self._take(destination, room_id, now_ms)
        if push.begun_ms > now_ms + _MOST_AHEAD_MS:
            push.begun_ms = now_ms  # the clock has been set back since
        if push.begun_ms <= now_ms:  # else this one takes the place of one that has yet to begin
            apart_ms = APART.after(push.count) if push.count else 0
            push.begun_ms = max(push.begun_ms + apart_ms, now_ms)
            push.count += 1
        push.noted_ms = now_ms
        return push.position, push.begun_ms

    def _take(self, destination: str, room_id: str, now_ms: int) -> _EarlierPush:
        """Forgets what is too old, or the oldest if there are too many; the one asked for becomes
        the newest."""
        key = (destination, room_id)
        push = self._pushes.pop(key, None)
        if push is None or push.noted_ms < now_ms - MAX_STICKY_DURATION_MS:
            push = _EarlierPush()
        self._pushes[key] = push
        oldest = next(iter(self._pushes))
        if (
            len(self._pushes) > MOST_REMEMBERED
            or self._pushes[oldest].noted_ms < now_ms - MAX_STICKY_DURATION_MS
        ) and oldest != key:
            del self._pushes[oldest]
        return push
