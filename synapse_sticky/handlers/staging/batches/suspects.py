"""Events that end the database's connection each time that they are persisted (H2).

A lost connection passes, so such an event would be tried for as long as it is sticky. A server
process of Postgres that dies even takes all other connections with it.
"""

from collections import OrderedDict

_ENOUGH = 10
_MOST = 10_000


class Suspects:
    """Which events are to blame, by their IDs. Each process that persists events finds out."""

    def __init__(self) -> None:
        # How often each ended a connection, and how many events had been persisted by then.
        self._failed: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._persisted = 0

    def __bool__(self) -> bool:
        """Has any event ended a connection? Until then it need not be told what is persisted."""
        return bool(self._failed)

    def persisted(self, event_id: str) -> None:
        """An event was persisted: the database was there."""
        self._persisted += 1
        self._failed.pop(event_id, None)

    def failed(self, event_id: str) -> bool:
        """The connection was lost while an event was persisted by itself; is that its own doing?

        It is if that has happened ten times, and other events were persisted between all of them.
        While the database is away, no event is to blame.
        """
        failures, persisted = self._failed.get(event_id, (0, -1))
        if self._persisted > persisted:
            failures = min(failures + 1, _ENOUGH)
        self._failed[event_id] = (failures, self._persisted)
        self._failed.move_to_end(event_id)
        while len(self._failed) > _MOST:
            self._failed.popitem(last=False)
        return failures >= _ENOUGH
