"""What limits did lately to the events of each server, as far as this process knows (E3).

It is in memory only: nothing is written for it. Strangers choose how many servers there are, so
those that came last are known.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection

_WINDOW_MS = 1_800_000
MOST_SERVERS = 1_000
"""Of so many servers each half hour is known; about 300 kB."""


class _Window:
    def __init__(self, begun_ms: int) -> None:
        self.begun_ms = begun_ms
        # By server, the last one behind; of each how often, by what was done and the limit.
        self.servers: OrderedDict[str, Counter[tuple[str, str]]] = OrderedDict()


class Lately:
    """Counts this half hour and the one before.

    Args:
        now_ms: the time in ms since the epoch.
    """

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self._now_ms = now_ms
        self.recorded: set[str] = set()
        """What this process does, and so can tell: ``refused``, ``deferred``."""
        self._windows: deque[_Window] = deque([_Window(now_ms())], maxlen=2)

    def _roll(self) -> None:
        now_ms, begun_ms = self._now_ms(), self._windows[-1].begun_ms
        # A clock that was set back must not count for ever.
        if not 0 <= now_ms - begun_ms < 2 * _WINDOW_MS:
            self._windows.clear()
        if not self._windows or now_ms - begun_ms >= _WINDOW_MS:
            self._windows.append(_Window(now_ms))

    def count(self, what: str, limit: str, server: str, number: int) -> None:
        """The limit did that to so many events of the server."""
        self._roll()
        servers = self._windows[-1].servers
        servers.setdefault(server, Counter())[what, limit] += number
        servers.move_to_end(server)
        if len(servers) > MOST_SERVERS:
            servers.popitem(last=False)

    @property
    def since_ms(self) -> int:
        """Since when is counted, in ms since the epoch."""
        self._roll()
        return self._windows[0].begun_ms

    def of(self, what: str, server: str) -> dict[str, int] | None:
        """To how many events of the server that was done, by limit; None if this process cannot
        tell."""
        if what not in self.recorded:
            return None
        self._roll()
        found: Counter[str] = Counter()
        for window in self._windows:
            for (done, limit), number in window.servers.get(server, Counter()).items():
                if done == what:
                    found[limit] += number
        return dict(found)

    def most(self, what: str, number: int) -> Collection[tuple[str, int]]:
        """So many servers with the most events to which that was done, each with how many."""
        self._roll()
        totals: Counter[str] = Counter()
        for window in self._windows:
            for server, counts in window.servers.items():
                total = sum(count for (done, _), count in counts.items() if done == what)
                if total:
                    totals[server] += total
        return sorted(totals.items(), key=lambda one: (-one[1], one[0]))[:number]
