"""When this server first had an event of another server (S2).

Between its receipt and the moment at which it is persisted, a PDU may be staged or parked for long.
Synapse counts its stickiness from the latter. Whoever handles a PDU before it is persisted notes
here when it was received; whoever enters it into the stream asks. It is asked in database threads,
too.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection

from synapse_sticky.homeserver.database import portions
from synapse_sticky.homeserver.process import Cursor, Homeserver
from synapse_sticky.homeserver.seams import table

SEAMS = (table("events", "event_id text, received_ts integer"),)

_MOST = 10_000
"""How many events are remembered, about 2 MB. Of others it is not known that they came earlier."""


class Received:
    """When events were received, as far as this process was told lately."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._lock = threading.Lock()
        # The last transaction, and of which events it was asked. Another thread's may follow it.
        self._asked: tuple[Cursor | None, frozenset[str]] = None, frozenset()
        # In ms since the epoch, those noted last behind.
        self._at_ms: OrderedDict[str, int] = OrderedDict()

    def note(self, event_id: str, at_ms: int) -> None:
        """It was here at this time, in ms since the epoch. The earliest counts."""
        with self._lock:
            self._at_ms[event_id] = min(at_ms, self._at_ms.pop(event_id, at_ms))
            if len(self._at_ms) > _MOST:
                self._at_ms.popitem(last=False)

    def at_ms(self, event_id: str) -> int | None:
        """When it was received, in ms since the epoch; None if that is not known."""
        return self._at_ms.get(event_id)

    def first_ms(self, event_id: str, now_ms: int) -> int:
        """When it was received, as far as that is known; else now."""
        return min(self._at_ms.get(event_id, now_ms), now_ms)

    def learn_txn(self, txn: Cursor, event_ids: Collection[str]) -> None:
        """Notes when those of these events were received that are in the database already: as
        outliers, which are no longer, or since this transaction began."""
        # Two ask in each transaction that persists sticky events.
        last_txn, asked = self._asked
        if last_txn is txn and asked.issuperset(event_ids):
            return
        self._asked = txn, frozenset(event_ids)
        for portion in portions(event_ids):
            clause, args = self._homeserver.in_list("event_id", portion)
            txn.execute(f"SELECT event_id, received_ts FROM events WHERE {clause}", args)
            for event_id, at_ms in txn.fetchall():
                if at_ms is not None:
                    self.note(event_id, at_ms)
