"""Parked PDUs of a room that was deleted here: they take no places from those of other rooms (L3).

Each process hears of a deletion. One that was not heard of, as after a restart, is found when the
PDUs are due. A room that is being joined is known before any of its PDUs is accepted.
"""

from collections.abc import Collection, Mapping

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.staging.parking.pdus import KnownTxn
from synapse_sticky.handlers.staging.parking.writing import ParkedWriter
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000)


class PurgedRooms:
    """Forgets the PDUs of rooms that are gone."""

    def __init__(
        self,
        homeserver: Homeserver,
        writer: ParkedWriter,
        known_txn: KnownTxn,
    ) -> None:
        """
        Args:
            known_txn: gives those of some rooms that are not gone.
        """
        self._homeserver = homeserver
        self._writer = writer
        self._known_txn = known_txn
        self._is_loaded = False
        self._purged: set[str] = set()
        self._forgetting = Retrying(
            homeserver,
            "forget_parked",
            "Could not forget the parked PDUs of purged rooms",
            self._forget,
            _BACKOFF,
        )

    def load(self) -> None:
        """The table is there."""
        self._is_loaded = True

    def note(self, *room_ids: str) -> None:
        """These rooms may be gone, or some of their events only."""
        if self._is_loaded and room_ids:
            self._purged.update(room_ids)
            self._forgetting.wake()

    async def _forget(self) -> None:
        while self._purged:
            # Out before they are looked at, as one may be purged again meanwhile.
            room_ids, self._purged = self._purged, set()
            try:
                gone = await self._homeserver.transact(
                    "forget_parked", _forget_txn, room_ids, self._known_txn
                )
            except Exception:
                self._purged |= room_ids
                raise
            self._writer.forget(gone)
            for room_id, count in gone.items():
                if count:
                    logger.info("Forgot %d parked PDUs of %s, which is gone here", count, room_id)
                    self._homeserver.metrics.dropped("purged", count)


def _forget_txn(txn: Cursor, room_ids: Collection[str], known_txn: KnownTxn) -> Mapping[str, int]:
    """Deletes the parked PDUs of those of the rooms that are gone, and gives these rooms, each with
    how many it had."""
    gone = dict.fromkeys({*room_ids} - known_txn(txn, room_ids), 0)
    if not gone:
        return gone
    # There is an index by both.
    txn.execute(
        "SELECT origin, room_id, COUNT(*) FROM synapse_sticky_incomplete"
        " GROUP BY origin, room_id ORDER BY origin, room_id"
    )
    found = [row for row in txn.fetchall() if row[1] in gone]
    txn.execute_batch(
        "DELETE FROM synapse_sticky_incomplete WHERE origin = ? AND room_id = ?",
        [(origin, room_id) for origin, room_id, _ in found],
    )
    for _, room_id, count in found:
        gone[room_id] += count
    return gone
