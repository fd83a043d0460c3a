"""PDUs on their way into the table: they wait until it is there, and while it cannot be written.

Meanwhile each stays staged, too, so that a crash does not lose it. Some are in memory, and written
as soon as that can be done. The others are processed once more then, as if they had just come.

Whoever parks a PDU holds the room's lock. So there is one attempt to write it; whatever follows is
done in the background, and waits by itself (H1).
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import attr

from synapse_sticky.backoff import Backoff, Retrying
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking import unknown
from synapse_sticky.handlers.staging.parking.pdus import Outcome, ParkedPdu
from synapse_sticky.handlers.staging.parking.places import Evicted
from synapse_sticky.handlers.staging.parking.reasons import name_of
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.handlers.staging.parking.handler import Staging

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000, spread=0)

_DROPPING = "Dropping the sticky PDU %s of %s: %s"

_MOST_IN_MEMORY = 500
"""As many as may be parked of one server, about 100 MB at the worst."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class ToPark:
    """A PDU that is to be parked.

    why: for the log, the administrator and the metrics (``reasons``).
    counts: whether this failure is one of the few after which it is given up.
    """

    pdu: ParkedPdu
    staged: StagedPdu
    why: str
    counts: bool = False


class ParkedWriter:
    """Writes PDUs into the table, now or as soon as that can be done."""

    def __init__(
        self,
        homeserver: Homeserver,
        table: ParkedTable,
        staging: "Staging",
        held: Held,
        on_parked: Callable[[], None],
    ) -> None:
        """
        Args:
            held: takes the PDUs that wait, and stay staged.
            on_parked: is called after a PDU was parked.
        """
        self._homeserver = homeserver
        self._table = table
        self._staging = staging
        self._held = held
        self._on_parked = on_parked
        self._is_loaded = False
        self._is_off = False
        self._waiting: OrderedDict[tuple[str, str], ToPark] = OrderedDict()
        self._writing = Retrying(
            homeserver, "park", "Could not park sticky PDUs yet", self._write_waiting, _BACKOFF
        )

    async def load(self) -> None:
        """The table is there: writes what waits for it. What cannot be written waits on."""
        self._is_loaded = True
        if self._waiting:
            await self._writing.run()

    def switch_off(self) -> None:
        """There will be no table."""
        self._is_off = True
        for to_park in self._waiting.values():
            logger.warning("Not parking the sticky PDU %s", to_park.pdu.event_id)
            self._homeserver.metrics.dropped("unwritable")
        self._waiting.clear()
        self._held.release(*self._held.rooms())

    async def park(self, to_park: ToPark) -> None:
        """Parks the PDU in the table; if that cannot be written now, as soon as it can."""
        key = (to_park.pdu.origin, to_park.pdu.event_id)
        if self._is_loaded:
            try:
                await self._write(to_park)
                return
            except Exception:
                name = to_park.pdu.event_id
                logger.info("Could not park the sticky PDU %s yet", name, exc_info=True)
        is_kept = False
        if not self._is_off:
            is_kept = self._held.hold(key, to_park.pdu.room_id)
            if key in self._waiting or len(self._waiting) < _MOST_IN_MEMORY:
                self._waiting[key] = to_park
                is_kept = True
        if not is_kept:
            self._homeserver.metrics.dropped("unwritable")
            logger.warning(
                "There is no table, or it cannot be written; not parking the sticky PDU %s: %s",
                *(to_park.pdu.event_id, to_park.why),
            )
            return
        if self._is_loaded:
            self._writing.wake()

    async def drop(self, pdu: ParkedPdu, why: str) -> None:
        """The PDU is given up."""
        logger.warning(_DROPPING, pdu.event_id, pdu.origin, why)
        self._homeserver.metrics.dropped("refused")
        self._waiting.pop((pdu.origin, pdu.event_id), None)
        self._held.release((pdu.origin, pdu.event_id))
        if not self._is_loaded:
            return
        try:
            await self._table.remove(pdu.origin, pdu.event_id)
        except Exception:
            # If it is parked it is tried once more, and dropped then.
            logger.info("Could not delete the parked PDU %s", pdu.event_id, exc_info=True)

    def forget(self, room_ids: Collection[str]) -> None:
        """Nothing waits that is of these rooms: they are gone, with all that was staged."""
        if not room_ids:
            return
        for key, to_park in [*self._waiting.items()]:
            if to_park.pdu.room_id in room_ids:
                del self._waiting[key]
        held = self._held.rooms().items()
        self._held.release(*(key for key, room_id in held if room_id in room_ids))

    async def _write_waiting(self) -> None:
        while self._waiting:
            key, to_park = next(iter(self._waiting.items()))
            try:
                if not await self._write(to_park):
                    self._homeserver.metrics.unparked(0, 1)
            except Exception:
                if key in self._waiting:
                    # Should it be the fault of this one, the others do not wait for it.
                    self._waiting.move_to_end(key)
                raise
            if self._waiting.get(key) is to_park:
                del self._waiting[key]
                await self._unstage(key)
            # The table can be written, whatever is the matter with those left.
            await self._process_others()
        await self._process_others()

    async def _unstage(self, key: tuple[str, str]) -> None:
        """Takes out of the staging area what is parked now, or given up."""
        if key not in self._held:
            return
        try:
            await self._staging.unstage(*key)
        except Exception:
            # It is processed once more, then.
            logger.info("Could not take %s out of the staging area", key[1], exc_info=True)
        self._held.release(key)

    async def _process_others(self) -> None:
        """Has those processed that are staged only: what fails again is parked."""
        held = self._held.rooms().items()
        others = {key: room_id for key, room_id in held if key not in self._waiting}
        self._held.release(*others)
        for room_id in dict.fromkeys(others.values()):
            try:
                await self._staging.process(room_id)
            except Exception:
                # Synapse looks for what is staged from time to time.
                logger.info("Could not go on with %s", room_id, exc_info=True)

    async def _write(self, to_park: ToPark) -> bool:
        """Gives False if it has expired. Raises what may pass."""
        pdu, now_ms = to_park.pdu, self._homeserver.now_ms()
        until_ms = to_park.staged.until_ms()
        if until_ms <= now_ms:
            return False
        try:
            outcome, evicted = await self._table.park(
                *(pdu, until_ms, now_ms + _BACKOFF.min_ms),
                [now_ms + after_ms for after_ms in unknown.AFTER_MS if to_park.counts],
                received_ts_ms=to_park.staged.received_ts_ms,
                why=to_park.why,
            )
        except Exception as e:
            if self._staging.verdict_of(e) in (Verdict.PASSES, Verdict.UNKNOWN):
                raise
            logger.warning("Could not park the sticky PDU %s: %r", pdu.event_id, e)
            self._homeserver.metrics.dropped("unwritable")
            return True
        self._say(to_park, outcome, evicted)
        return True

    def _say(self, to_park: ToPark, outcome: Outcome, evicted: Evicted | None) -> None:
        pdu = to_park.pdu
        if evicted is not None:
            self._homeserver.metrics.dropped("evicted")
            logger.warning(
                "Dropping the sticky PDU %s of %s in %s: its server has parked most, and %s of %s"
                " needs a place",
                *(evicted.event_id, evicted.origin, evicted.room_id, pdu.event_id, pdu.origin),
            )
        if outcome is Outcome.PARKED:
            logger.info("Parked the sticky PDU %s: %s", pdu.event_id, to_park.why)
            self._homeserver.metrics.parked(name_of(to_park.why))
            self._on_parked()
        elif outcome is Outcome.STILL_PARKED:
            # The operator knows; one that cannot be completed fails until it expires.
            logger.debug("The sticky PDU %s stays parked: %s", pdu.event_id, to_park.why)
            self._on_parked()
        elif outcome is Outcome.GIVEN_UP:
            why = f"{to_park.why} (tried {len(unknown.AFTER_MS) + 1} times)"
            logger.warning(_DROPPING, pdu.event_id, pdu.origin, why)
            self._homeserver.metrics.dropped("tried_often")
        else:
            self._homeserver.metrics.dropped("full")
            logger.warning(
                "Too many sticky PDUs of %s are parked, not parking %s: %s",
                *(pdu.origin, pdu.event_id, to_park.why),
            )
