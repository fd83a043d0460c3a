"""Received is when this server first had a PDU, not when it could be persisted (S2).

The process that is about to persist a PDU finds out: it may be staged, or parked, also of another
server, and by another process. What is fetched as somebody's prev_event counts from the fetch. An
event that was an outlier counts from when it became one. With workers the process hands the time on
to the one that persists the event.

Fails open: if it cannot be found out, the event counts from now, as with plain Synapse.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.causes import is_locked, is_outage
from synapse_sticky.homeserver.received import Received
from synapse_sticky.homeserver.spec import LONGEST_NAME
from synapse_sticky.logs import bounded

logger = bounded(__name__)

_MOST_CHOSEN = 1_000
"""About so many are looked up before they are processed, 200 kB at most. Of others it is asked."""

Tell = Callable[[str, Collection[str]], Awaitable[None] | None]
"""Takes the server that sent sticky PDUs, and their event IDs. Gives what to wait for before they
are processed, None if that is nothing."""


class Receiving(Protocol):
    """The PDUs that this process is about to persist."""

    def tell(self, tell: Tell) -> None:
        """From now on tells of sticky PDUs before they are processed, and enters none for longer
        than it may be sticky by when it was received."""

    def staged_txn(self, txn: Cursor, origin: str, event_ids: Collection[str]) -> Mapping[str, int]:
        """When those of this origin's PDUs that are staged were, in ms since the epoch."""


class ParkedTimes(Protocol):
    """The table of parked PDUs."""

    def received_txn(self, txn: Cursor, event_ids: Collection[str]) -> Mapping[str, int]:
        """When those that are parked, whoever sent them, were received first, in ms since the
        epoch. None while the table is not there."""


class ReceivedHandler:
    """Finds out when PDUs were received."""

    def __init__(
        self,
        homeserver: Homeserver,
        receiving: Receiving,
        received: Received,
        parked: ParkedTimes,
    ) -> None:
        self._homeserver = homeserver
        self._receiving = receiving
        self._received = received
        self._parked = parked
        # By origin and event ID: what the database was asked about when it was chosen.
        self._chosen: OrderedDict[tuple[str, str], bool] = OrderedDict()

    def install(self) -> None:
        """Takes effect from the next PDU on."""
        self._receiving.tell(self.note)

    def note_chosen_txn(self, txn: Cursor, origin: str, event_id: str, staged_ms: int) -> None:
        """Notes when this PDU of the origin, which is processed next, was received first. Does not
        wait long for a table that is locked.

        Args:
            txn: is of the transaction that chooses it, which only reads, and ends with this. So
                ``note`` needs none of its own.
            staged_ms: when it was staged, in ms since the epoch.
        """
        if len(event_id) > LONGEST_NAME:
            return
        received_ms = [staged_ms]
        try:
            self._homeserver.wait_briefly_txn(txn)
            received_ms += self._parked.received_txn(txn, [event_id]).values()
        except Exception as e:
            if is_outage(e) and not is_locked(e):
                raise  # Synapse may try the transaction again
            # It is chosen all the same, or another server's PDU would have its turn.
            logger.exception("Could not find out whether %s was parked before", event_id)
        self._received.note(event_id, min(received_ms))
        self._chosen[origin, event_id] = True
        if len(self._chosen) > _MOST_CHOSEN:
            self._chosen.popitem(last=False)

    def note(self, origin: str, event_ids: Collection[str]) -> Awaitable[None] | None:
        """Notes when these PDUs, which this process has now, were received first. Gives what to
        wait for if it has to ask the database."""
        now_ms = self._homeserver.now_ms()
        for event_id in event_ids:
            self._received.note(event_id, now_ms)
        unknown = [
            event_id for event_id in event_ids if not self._chosen.pop((origin, event_id), False)
        ]
        return self._ask_for(origin, unknown) if unknown else None

    async def _ask_for(self, origin: str, unknown: Collection[str]) -> None:
        def read_txn(txn: Cursor) -> list[tuple[str, int]]:
            staged = self._receiving.staged_txn(txn, origin, unknown)
            return [*staged.items(), *self._parked.received_txn(txn, unknown).items()]

        found: list[tuple[str, int]] = []
        try:
            found = await self._homeserver.transact_briefly("received", read_txn)
        except Exception:
            logger.exception("Could not find out when PDUs of %s were received", origin)
        for event_id, at_ms in found:
            self._received.note(event_id, at_ms)
