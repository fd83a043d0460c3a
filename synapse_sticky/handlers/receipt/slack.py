"""How many more sticky PDUs of an origin may be accepted before they are counted again (L6).

Whoever is far from a bound is not counted at each transaction: the database is asked once in
``_STANDS_MS`` at most for as long as no more than half of what was left is used up. So several
processes that receive let through that much each, beyond the bound, in this time.
"""

from collections import OrderedDict
from collections.abc import Callable

_STANDS_MS = 2_000
_MOST_ORIGINS = 10_000
"""About 2 MB. Another one is counted at each transaction."""


class Slack:
    """What is left to origins that were counted lately. It is asked in several threads."""

    def __init__(self, steady_ms: Callable[[], int]) -> None:
        """
        Args:
            steady_ms: a time in ms that goes on evenly.
        """
        self._steady_ms = steady_ms
        # By origin, those counted last behind: how many are left, and until when, in ms.
        self._left: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def found(self, origin: str, left: int) -> None:
        """So many more of the origin may be accepted from now on."""
        self._left.pop(origin, None)
        self._left[origin] = left, self._steady_ms() + _STANDS_MS
        if len(self._left) > _MOST_ORIGINS:
            self._left.popitem(last=False)

    def take(self, origin: str, number: int) -> bool:
        """Accepts so many of the origin, if that many are left; else they have to be counted."""
        left, until_ms = self._left.get(origin, (0, 0))
        if left < number or until_ms <= self._steady_ms():
            return False
        self._left[origin] = left - number, until_ms
        return True
