"""Events that are passed over where another one comes after them.

Synapse fetches the events that a PDU lacks before it. One that the database never takes would keep
out whatever comes after it in the room.
"""

from collections import OrderedDict
from collections.abc import Callable

from synapse_sticky.handlers.staging.parking import unknown
from synapse_sticky.homeserver.causes import Verdict

_MOST = 10_000
_FOR_MS = 600_000
"""How long one is passed over. Someone may have mended that then."""


class PassedOver:
    """Which events are passed over, by their IDs. Each process finds out by itself."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        """
        Args:
            now_ms: the time in ms.
        """
        self._now_ms = now_ms
        # How often each failed, as far as that counts, and when it did last.
        self._failed: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def __contains__(self, event_id: str) -> bool:
        tries, at_ms = self._failed.get(event_id, (0, 0))
        return tries > len(unknown.AFTER_MS) and self._now_ms() - at_ms < _FOR_MS

    def failed(self, event_id: str, verdict: Verdict) -> bool:
        """An event failed for such a cause; is it passed over from now on?

        Where nobody knows whether the cause passes, it has as many tries as a parked PDU, with the
        same delays. Tries at shorter distance do not count: many PDUs may come after it at once.
        """
        if verdict is Verdict.PASSES:
            return False
        now_ms = self._now_ms()
        tries, at_ms = self._failed.get(event_id, (0, 0))
        if now_ms - at_ms >= _FOR_MS:
            tries = 0
        enough = len(unknown.AFTER_MS) + 1
        if verdict is Verdict.REFUSED:
            tries = enough
        elif not tries or now_ms - at_ms >= unknown.AFTER_MS[min(tries, enough - 1) - 1]:
            tries = min(tries + 1, enough)
        else:
            return tries >= enough
        self._failed[event_id] = (tries, now_ms)
        self._failed.move_to_end(event_id)
        while len(self._failed) > _MOST:
            self._failed.popitem(last=False)
        return tries >= enough
