"""What administrators are told of parked PDUs (E3)."""

import json
from collections.abc import Sequence
from typing import Any

import attr

from synapse_sticky.homeserver import Cursor

_MOST_REASONS = 20
_MOST_A_PAGE = 50


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ParkedEvent:
    """A parked PDU, as it is shown. Times are in ms since the epoch.

    why: why it could not be persisted when it was parked; None of one that an earlier version of
        the module parked.
    tries: how often it has failed since for a reason that nobody knows.
    """

    origin: str
    room_id: str
    why: str | None
    received_ms: int
    until_ms: int
    due_ms: int
    tries: int


class ParkedReader:
    """Reads the table of parked PDUs, which has layout ``layout`` at least."""

    duty = "parking"
    layout = 4

    def of_event_txn(self, txn: Cursor, event_id: str) -> ParkedEvent | None:
        """The PDU of this ID, of the origin that sent it first; None if none is parked."""
        txn.execute(
            "SELECT origin, room_id, reason, received_ts_ms, until_ms, due_ms, tries"
            " FROM synapse_sticky_incomplete WHERE event_id = ?"
            " ORDER BY received_ts_ms, origin LIMIT 1",
            (event_id,),
        )
        row = txn.fetchone()
        return None if row is None else ParkedEvent(*row)

    def counts_txn(self, txn: Cursor, at_most: int) -> dict[str, Any]:
        """How many are parked, by reason; the first ``at_most`` rows count."""
        txn.execute(
            "SELECT reason, COUNT(*) FROM"
            " (SELECT reason FROM synapse_sticky_incomplete LIMIT ?) AS few"
            " GROUP BY reason ORDER BY COUNT(*) DESC, reason LIMIT ?",
            (at_most, _MOST_REASONS),
        )
        by_reason = {why or "not recorded": count for why, count in txn.fetchall()}
        txn.execute(
            "SELECT COUNT(*) FROM (SELECT origin FROM synapse_sticky_incomplete LIMIT ?) AS few",
            (at_most,),
        )
        ((total,),) = txn.fetchall()
        return {"parked": {"pdus": total, "by_reason": by_reason}}

    def rooms(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The rooms of the parked PDUs, as SQL. There is an index: their content is not read."""
        return "SELECT room_id AS name FROM synapse_sticky_incomplete", ()

    def servers(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The servers that sent them, likewise."""
        return "SELECT origin AS name FROM synapse_sticky_incomplete", ()

    def of_room_txn(
        self, txn: Cursor, room_id: str, after: str, limit: int
    ) -> Sequence[tuple[str, str | None, str | None, ParkedEvent]]:
        """The room's parked PDUs after this event ID, at most 50, in the order of their IDs: each
        with its ID, its sender and its type."""
        txn.execute(
            "SELECT DISTINCT event_id FROM synapse_sticky_incomplete"
            " WHERE room_id = ? AND event_id > ? ORDER BY event_id LIMIT ?",
            (room_id, after, min(limit, _MOST_A_PAGE)),
        )
        found = []
        for (event_id,) in txn.fetchall():
            # One after the other: a PDU has up to 196 kB here.
            txn.execute(
                "SELECT event_json FROM synapse_sticky_incomplete WHERE event_id = ? LIMIT 1",
                (event_id,),
            )
            row, parked = txn.fetchone(), self.of_event_txn(txn, event_id)
            if row is not None and parked is not None:
                pdu = json.loads(row[0])
                found.append((event_id, _text(pdu, "sender"), _text(pdu, "type"), parked))
        return found


def _text(pdu: Any, field: str) -> str | None:
    value = pdu.get(field) if isinstance(pdu, dict) else None
    return value if isinstance(value, str) else None
