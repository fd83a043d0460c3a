"""The places for questions: how many are under way at once, and who waits in line for one (H1, H3).

Pure bookkeeping: time is an argument.
"""

import itertools
from collections import OrderedDict

import attr

MOST_AT_ONCE = 20
"""How many questions of this process may be under way, to all destinations."""

MOST_SLOW = MOST_AT_ONCE // 2
"""How many of them may be to destinations that were slow the last time."""

SLOW_MS = 1_000
"""Who took this long to answer was slow."""

_MOST_REMEMBERED = 10_000


@attr.s(auto_attribs=True, slots=True)
class _Line:
    """Who waits, first in, first out; by destination, its number in both lines together."""

    most: int
    under_way: int = 0
    waiting: "OrderedDict[str, int]" = attr.Factory(OrderedDict)

    def first(self) -> int | None:
        """The number of the first one, if there is a place for it."""
        if not self.waiting or self.under_way >= self.most:
            return None
        return next(iter(self.waiting.values()))


class Places:
    """Each destination has a place at most, and waits for one at most once.

    Those that were slow the last time have a line of their own: however many they are and however
    long they take, half of the places are left to all others.
    """

    def __init__(self) -> None:
        self._fast, self._slow = _Line(MOST_AT_ONCE), _Line(MOST_SLOW)
        self._under_way: dict[str, tuple[_Line, int]] = {}
        """Where the destination waited, and since when it has its place."""
        self._were_slow: OrderedDict[str, None] = OrderedDict()
        self._numbers = itertools.count()

    def wait(self, destination: str) -> None:
        """The destination joins the end of its line."""
        line = self._slow if destination in self._were_slow else self._fast
        line.waiting[destination] = next(self._numbers)

    def stop_waiting(self, destination: str) -> None:
        """The destination leaves its line, which it must be in."""
        line = self._slow if destination in self._slow.waiting else self._fast
        del line.waiting[destination]

    def take(self, now_ms: int) -> str | None:
        """Gives the next free place to the one that has waited longest of those who may have it;
        None if nobody may."""
        if len(self._under_way) >= MOST_AT_ONCE:
            return None
        firsts = [(n, line) for line in (self._fast, self._slow) if (n := line.first()) is not None]
        if not firsts:
            return None
        _, line = min(firsts, key=lambda first: first[0])
        destination, _ = line.waiting.popitem(last=False)
        line.under_way += 1
        self._under_way[destination] = line, now_ms
        return destination

    def leave(self, destination: str, now_ms: int) -> None:
        """The destination has answered, or will not: its place is free."""
        line, since_ms = self._under_way.pop(destination)
        line.under_way -= 1
        self._were_slow.pop(destination, None)
        if now_ms - since_ms >= SLOW_MS:
            self._were_slow[destination] = None
        if len(self._were_slow) > _MOST_REMEMBERED:
            self._were_slow.popitem(last=False)
