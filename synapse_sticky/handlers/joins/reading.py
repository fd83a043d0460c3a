"""What administrators are told of newcomers (E3)."""

from collections.abc import Collection
from typing import Any

import attr

from synapse_sticky.homeserver import Cursor, Homeserver

_WATCH_MS = 3_600_000


@attr.s(auto_attribs=True, frozen=True, slots=True)
class NewcomerState:
    """A newcomer of a room, as it is shown.

    position: the newcomer has all own events of the room before this position of the sticky events
        stream. 0 until it has had everything once.
    joined_ms: when this server saw the join, in ms since the epoch.
    """

    destination: str
    room_id: str
    position: int
    joined_ms: int


class NewcomerReader:
    """Reads the table of newcomers, which has layout ``layout`` at least."""

    duty = "joins"
    layout = 1

    def __init__(self, homeserver: Homeserver) -> None:
        self._homeserver = homeserver

    def of_room_txn(
        self, txn: Cursor, room_id: str, destinations: Collection[str]
    ) -> dict[str, NewcomerState]:
        """Those of the destinations that are newcomers of the room. One look-up for each."""
        clause, args = self._homeserver.in_list("destination", destinations)
        txn.execute(
            "SELECT destination, room_id, position, watch_until_ms FROM synapse_sticky_newcomers"
            f" WHERE {clause} AND room_id = ?",
            (*args, room_id),
        )
        return {
            destination: NewcomerState(destination, room, position, until_ms - _WATCH_MS)
            for destination, room, position, until_ms in txn.fetchall()
        }

    def counts_txn(self, txn: Cursor, at_most: int) -> dict[str, Any]:
        """How many there are, and how many of them may lack something; the first ``at_most`` rows
        count. One that has had everything once is watched on, and lacks nothing."""
        txn.execute(
            "SELECT COUNT(*), SUM(CASE WHEN position = 0 THEN 1 ELSE 0 END),"
            " MIN(CASE WHEN position = 0 THEN watch_until_ms END) FROM"
            " (SELECT position, watch_until_ms FROM synapse_sticky_newcomers LIMIT ?) AS few",
            (at_most,),
        )
        ((total, open_count, until_ms),) = txn.fetchall()
        oldest_ms = None if until_ms is None else until_ms - _WATCH_MS
        found = {"all": total, "open": open_count or 0, "oldest_open_ms": oldest_ms}
        return {"newcomers": found}

    def servers(self, now_ms: int) -> tuple[str, tuple[Any, ...]]:
        """The newcomers that may lack something, a row for each room, as SQL."""
        return "SELECT destination AS name FROM synapse_sticky_newcomers WHERE position = 0", ()
