"""Acknowledged sticky events that cannot be persisted yet are parked, and tried again (L3).

Synapse drops an acknowledged PDU if the event persister or the database fails. Synapse also drops
it if its prev_events or auth_events cannot be fetched, as the server that sent it does not answer,
and if the room's state becomes whole for a second time meanwhile. While this server joins the room,
the joining process has the PDU in memory only, and a crash loses it; the other processes drop it.
This module parks such a PDU: it puts the PDU into a table. A process stages the PDU again
(trying.py), until it is persisted or expires, also after a restart.

Nothing waits while Synapse has the room's lock: there is one attempt to persist a PDU, and one to
park it. A PDU that cannot be written into the table stays staged until it can, and the room goes on
without it. What the database refuses is dropped. Where nobody knows whether the cause passes, there
are three tries (unknown.py).

Fails open: a PDU that cannot be parked is dropped, as Synapse drops it.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.pdus import ParkedPdu
from synapse_sticky.handlers.staging.parking.purged import PurgedRooms
from synapse_sticky.handlers.staging.parking.redacted import RedactedSenders
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.parking.trying import FIRST_TRY_MS, Origins, Trying
from synapse_sticky.handlers.staging.parking.writing import ParkedWriter, ToPark
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import NewerLayoutError
from synapse_sticky.index import Stream

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms


class Staging(Protocol):
    """The staging area, and what becomes of the PDUs in it."""

    receives: bool
    """Whether other servers' transactions can reach this process."""

    def begin_on_staged_pdus(self) -> None:
        """Processes at once what an earlier run left in the area, in a process that receives
        transactions. Synapse itself waits for the next transaction of anybody."""

    async def process(self, room_id: str) -> None:
        """Begins with what is staged for the room, unless that is under way."""

    def is_joining(self, room_id: str) -> bool:
        """Does this process join the room now, so that it does not process the room's PDUs?"""

    def stage_txn(self, txn: Cursor, room_id: str, pdus: Sequence[ParkedPdu]) -> None:
        """Stages PDUs of the room, in this order, behind those that are there; none if the room is
        gone."""

    def known_txn(self, txn: Cursor, room_ids: Collection[str]) -> set[str]:
        """Those of the rooms that this server knows. A deleted one it does not."""

    async def unstage(self, origin: str, event_id: str) -> None:
        """Takes the PDU of this origin out of the area, if it is there."""

    async def persisted(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are here, and in full."""

    async def existing(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are here, be it as outliers or rejected."""

    def verdict_of(self, e: Exception) -> Verdict | None:
        """Does the cause of this error pass? None if it is not the database's, nor an event
        persister's."""

    def park_by(self, fail: "Fail") -> None:
        """From now on deals with sticky PDUs that cannot be persisted.

        Args:
            fail: takes a PDU that Synapse drops, or has in memory only while it joins the room,
                with the reason, and whether that passes. It waits for nothing but the database,
                and is called while Synapse has the room's lock. It gets no PDU that is too large.
        """


Fail = Callable[[ParkedPdu, StagedPdu, str, Verdict], Awaitable[None]]


class ParkingHandler:
    """Parks sticky PDUs that cannot be persisted yet, and has them processed again."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        staging: Staging,
        origins: Origins,
        table: ParkedTable,
        held: Held,
        stream: Stream,
    ) -> None:
        self._homeserver = homeserver
        self._staging = staging
        self._table = table
        self._writer = ParkedWriter(homeserver, table, staging, held, self._on_parked)
        self._stream = stream
        self._purged = PurgedRooms(homeserver, self._writer, staging.known_txn)
        self._redacted = RedactedSenders(homeserver)
        self._trying = Trying(homeserver, rooms, staging, table, origins, self._purged.note)

    def install(self) -> None:
        """Takes effect from the next PDU on."""
        self._staging.park_by(self._homeserver.metrics.timed("parking", "park", self.fail))
        self._stream.on_room_purged(self._purged.note)
        self._stream.on_user_redacted(self._redacted.note)
        self._trying.install()

    async def load(self) -> None:
        """Has what was acknowledged before a restart processed without waiting for others.

        Raises:
            NewerLayoutError: a later version of the module made the table.
        """
        try:
            await self._table.prepare()
        except NewerLayoutError:
            self._writer.switch_off()
            raise
        self._purged.load()
        await self._writer.load()
        self._staging.begin_on_staged_pdus()
        if self._staging.receives:
            self._redacted.load()
            self._trying.within(0)

    # Parking

    async def fail(self, pdu: ParkedPdu, staged: StagedPdu, why: str, verdict: Verdict) -> None:
        """Parks or drops a PDU that Synapse is about to drop, or has in memory only.

        There is one attempt to write it into the table; then it stays staged until that goes well.

        Args:
            why: for the log, the administrator and the metrics (``reasons``).
            verdict: whether the reason passes.
        """
        if verdict is Verdict.REFUSED:
            await self._writer.drop(pdu, why)
        else:
            await self._writer.park(ToPark(pdu, staged, why, verdict is Verdict.UNKNOWN))

    def _on_parked(self) -> None:
        self._trying.within(FIRST_TRY_MS)
