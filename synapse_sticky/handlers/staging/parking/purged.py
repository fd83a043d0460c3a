"""Parked PDUs of a room that was deleted here: they take no places from those of other rooms (L3).

Each process hears of a deletion. One that was not heard of, as after a restart, is found when the
PDUs are due. A room that is being joined is known before any of its PDUs is accepted.
"""

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.staging.parking.pdus import KnownTxn
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.parking.writing import ParkedWriter
from synapse_sticky.homeserver import Homeserver

_BACKOFF = Backoff(1_000, 60_000)


class PurgedRooms:
    """Forgets the PDUs of rooms that are gone."""

    def __init__(
        self,
        homeserver: Homeserver,
        table: ParkedTable,
        writer: ParkedWriter,
        known_txn: KnownTxn,
    ) -> None:
        """
        Args:
            known_txn: gives those of some rooms that are not gone.
        """
        self._table = table
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
                gone = await self._table.forget_gone(room_ids, self._known_txn)
            except Exception:
                self._purged |= room_ids
                raise
            self._writer.forget(gone)
