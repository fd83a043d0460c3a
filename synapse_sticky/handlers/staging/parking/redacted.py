"""Parked PDUs of a sender whose events in the room were redacted all at once (S5).

Nobody would see them: Synapse redacts what it persists of the sender until that ends, as with an
unban. So they give up their places. One that another server than the sender's has sent stays, and
is redacted once it is persisted.
"""

import json

from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.whole import can_tell_of_users, is_user_redacted_txn
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000)

PAUSE_MS = 1_000
MOST_AT_ONCE = 5
"""So many senders are looked for at a time, as their PDUs are found by what is in them."""

_MOST = 1_000
"""So many senders wait to be looked for."""


class RedactedSenders:
    """Forgets their parked PDUs."""

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver
        self._is_loaded = False
        # Rooms and senders.
        self._redacted: set[tuple[str, str]] = set()
        self._forgetting = Retrying(
            homeserver,
            "forget_redacted",
            "Could not forget the parked PDUs of redacted senders",
            self._forget,
            _BACKOFF,
        )
        self._alarm = Alarm(homeserver, "forget_redacted", self._forgetting.run)

    def load(self) -> None:
        """The table is there."""
        self._is_loaded = can_tell_of_users(self._homeserver)

    def note(self, room_id: str, user_id: str) -> None:
        """All of the user's events in the room may be redacted."""
        # Those whose data can be erased in all rooms are this server's own: none of theirs is
        # parked.
        if self._is_loaded and room_id and len(self._redacted) < _MOST:
            self._redacted.add((room_id, user_id))
            self._alarm.ring_in(PAUSE_MS)

    async def _forget(self) -> None:
        for _ in range(MOST_AT_ONCE):
            if not self._redacted:
                return
            # Out before it is looked for, as it may be redacted again meanwhile.
            pair = self._redacted.pop()
            try:
                count = await self._homeserver.transact("forget_redacted", _forget_txn, *pair)
            except Exception:
                self._redacted.add(pair)
                raise
            if count:
                self._homeserver.metrics.dropped("redacted", count)
                logger.info("Forgot %d parked PDUs of %s, redacted in %s", count, pair[1], pair[0])
        if self._redacted:
            self._alarm.ring_in(PAUSE_MS)


def _forget_txn(txn: Cursor, room_id: str, user_id: str) -> int:
    if not is_user_redacted_txn(txn, room_id, user_id):
        return 0
    origin = user_id.partition(":")[2]
    # As it is stored. Deeper within a PDU there may be the same, so each is looked into.
    text = f'"sender":{json.dumps(user_id)}'
    for special in "!%_":
        text = text.replace(special, f"!{special}")
    txn.execute(
        "SELECT event_id FROM synapse_sticky_incomplete"
        " WHERE origin = ? AND room_id = ? AND event_json LIKE ? ESCAPE '!'",
        (origin, room_id, f"%{text}%"),
    )
    found = [event_id for (event_id,) in txn.fetchall()]
    of_sender = [event_id for event_id in found if _sender_txn(txn, origin, event_id) == user_id]
    txn.execute_batch(
        "DELETE FROM synapse_sticky_incomplete WHERE origin = ? AND event_id = ?",
        [(origin, event_id) for event_id in of_sender],
    )
    return len(of_sender)


def _sender_txn(txn: Cursor, origin: str, event_id: str) -> object:
    # One by one: all of them may have 100 MB.
    txn.execute(
        "SELECT event_json FROM synapse_sticky_incomplete WHERE origin = ? AND event_id = ?",
        (origin, event_id),
    )
    row = txn.fetchone()
    return json.loads(row[0]).get("sender") if row else None
