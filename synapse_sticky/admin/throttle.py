"""How often somebody may ask (H3)."""

from collections.abc import Callable

from synapse_sticky._core import Limiter
from synapse_sticky.limits import Refusal

_PER_SECOND, _BURST = 20.0, 200
"""Of one administrator, and of one address, whoever asks from there."""

_CAPACITY = 1_024
"""So many of them are counted apart; others share buckets."""


class Throttle:
    """Counts the requests that this process is asked.

    An address is counted before its access token is looked up, so that nobody tries many.

    Args:
        now_ms: gives the time in ms, of a clock that goes on evenly.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        limits = {"per_user": (_PER_SECOND, _BURST)}
        self._addresses = Limiter(limits, _CAPACITY)
        self._admins = Limiter(limits, _CAPACITY)

    def address(self, address: str) -> None:
        """Raises ``SynapseError`` (429) if too many requests come from there."""
        self._count(self._addresses, address)

    def admin(self, user_id: str) -> None:
        """Raises ``SynapseError`` (429) if the administrator asks too often."""
        self._count(self._admins, user_id)

    def _count(self, limiter: Limiter, who: str) -> None:
        refused = limiter.admit_user(who, self._now_ms())
        if refused is not None:
            raise Refusal(*refused).error()
