"""The places for parked PDUs: how many strangers can make this server keep (H3).

Where all places are taken, the server with the most PDUs there loses its last one.
"""

import attr

from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.homeserver import Cursor

# A PDU has at most 64 kB, 196 kB once its JSON is escaped.
MOST_OF_SERVER = 500
MOST = 5_000
MOST_OUTSIDE = 1_000
"""For rooms that this server is not in: it joins them, or somebody says that it does."""
MOST_OUTSIDE_OF_ROOM = 100

_TABLE = "synapse_sticky_incomplete"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Evicted:
    """A PDU that is parked no more, as another one has its place."""

    origin: str
    event_id: str
    room_id: str


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Place:
    """A place for a PDU, and the one that had it before, if one had."""

    evicted: Evicted | None = None


def make_place_txn(txn: Cursor, pdu: ParkedPdu) -> Place | None:
    """A place for one more PDU, be it that of another one; None if there is none."""
    txn.execute(f"SELECT COUNT(*) FROM {_TABLE} WHERE origin = ?", (pdu.origin,))
    if _only_number(txn) >= MOST_OF_SERVER:
        return None
    # Each is counted in an index: a row has up to 196 kB before what is asked of it.
    places: list[tuple[str, tuple[str, ...], int]] = [("1 = 1", (), MOST)]
    if pdu.is_outside:
        places.insert(0, ("outside = 1", (), MOST_OUTSIDE))
        places.insert(0, ("outside = 1 AND room_id = ?", (pdu.room_id,), MOST_OUTSIDE_OF_ROOM))
    for where, args, most in places:
        txn.execute(f"SELECT origin, COUNT(*) FROM {_TABLE} WHERE {where} GROUP BY origin", args)
        counts: dict[str, int] = dict(txn.fetchall())
        if sum(counts.values()) < most:
            continue
        origin = min(counts, key=lambda origin: (-counts[origin], origin))
        if counts[origin] <= counts.get(pdu.origin, 0) + 1:
            return None
        txn.execute(
            f"SELECT origin, event_id, room_id FROM {_TABLE} WHERE {where} AND origin = ?"
            " ORDER BY received_ts_ms DESC LIMIT 1",
            (*args, origin),
        )
        evicted = Evicted(*txn.fetchall()[0])
        txn.execute(
            f"DELETE FROM {_TABLE} WHERE origin = ? AND event_id = ?",
            (evicted.origin, evicted.event_id),
        )
        # Its place is one of all that follow, too.
        return Place(evicted)
    return Place()


def _only_number(txn: Cursor) -> int:
    row = txn.fetchone()
    return row[0] if row else 0
