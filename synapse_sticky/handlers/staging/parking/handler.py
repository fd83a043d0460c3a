"""Acknowledged sticky events that cannot be persisted yet are parked, and tried again (L3).

Synapse drops an acknowledged PDU if the event persister or the database fails. Synapse also drops
it if the prev_events cannot be fetched, as the servers that have them cannot be reached. While this
server joins the room, the joining process has the PDU in memory only, and a crash loses it; the
other processes drop it. This module parks such a PDU: it puts the PDU into a table. From time to
time a process stages the PDU again, until it is persisted or expires, also after a restart.

PDUs whose prev_events are persisted are tried all at once, but only once: some PDUs always fail.
Then, and where prev_events are missing, one PDU of each origin and room is tried at a time. Else a
server that does not answer requests for prev_events would hold up the room for too long. The oldest
PDU is tried first, as PDUs mostly form a chain. If that does not help, the others take turns with
it, the newest first: Synapse fetches the ones before a PDU on the way to it.

Nothing waits while Synapse has the room's lock: there is one attempt to persist a PDU, and one to
park it. A PDU that cannot be written into the table stays staged until it can, and the room goes on
without it. What the database refuses is dropped. Where nobody knows whether the cause passes, there
are three tries (unknown.py).

Fails open: a PDU that cannot be parked is dropped, as Synapse drops it.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.staging.held import Held
from synapse_sticky.handlers.staging.parking.purged import PurgedRooms
from synapse_sticky.handlers.staging.parking.redacted import RedactedSenders
from synapse_sticky.handlers.staging.parking.tables import (
    LONGEST_MS,
    ParkedPdu,
    ParkedTable,
    ScheduledPdu,
)
from synapse_sticky.handlers.staging.parking.writing import ParkedWriter, ToPark
from synapse_sticky.handlers.staging.pdu import StagedPdu
from synapse_sticky.homeserver import Cancellable, Cursor, Homeserver
from synapse_sticky.homeserver.causes import Verdict
from synapse_sticky.homeserver.layout import NewerLayoutError, migrate
from synapse_sticky.index import Stream
from synapse_sticky.logs import bounded

if TYPE_CHECKING:
    from synapse_sticky.homeserver.rooms import Rooms

logger = bounded(__name__)

_BACKOFF = Backoff(1_000, 60_000, spread=0)

_CHECK_AFTER_MS = 1_000
"""After an attempt: by then it has gone well, or the other server does not answer."""

_TURN_MS = 60_000
"""How long the oldest is tried, and then another one."""

_MOST_TRIED = 10_000
"""Twice as many as may be parked in all. One that is no longer remembered is only tried again."""

_POLL_MS = 60_000
"""Another process may have parked PDUs, and be gone."""

_AFTER_FAILURE_MS = 10_000
"""When one origin's PDUs of a room are tried again, if something is wrong with them."""


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

    def verdict_of(self, e: Exception) -> Verdict | None:
        """Does the cause of this error pass? None if it is not the database's, nor an event
        persister's."""

    def park_by(self, fail: "Fail") -> None:
        """From now on deals with sticky PDUs that cannot be persisted.

        Args:
            fail: takes a PDU that Synapse drops, or has in memory only while it joins the room,
                with the reason, and whether that passes. It waits for nothing but the database, and
                is called while Synapse has the room's lock. It gets no PDU that is too large.
        """


Fail = Callable[[ParkedPdu, StagedPdu, str, Verdict], Awaitable[None]]

_Key = tuple[str, str]  # origin and event ID


class ParkingHandler:
    """Parks sticky PDUs that cannot be persisted yet, and has them processed again."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: "Rooms",
        staging: Staging,
        table: ParkedTable,
        held: Held,
        stream: Stream,
    ) -> None:
        self._homeserver = homeserver
        self._rooms = rooms
        self._staging = staging
        self._table = table
        self._writer = ParkedWriter(homeserver, table, staging, held, self._on_parked)
        self._stream = stream
        self._purged = PurgedRooms(homeserver, table, self._writer, staging.known_txn)
        self._redacted = RedactedSenders(homeserver)
        self._timer: Cancellable | None = None
        self._timer_due_ms = 0
        self._is_trying = False
        self._failures_to_try = 0
        # Origins and rooms that could not even be put off in the table, and until when they are.
        self._put_off_ms: dict[tuple[str, str], int] = {}
        # What this process tried when its prev_events were there.
        self._tried: OrderedDict[_Key, None] = OrderedDict()

    def install(self) -> None:
        """Takes effect from the next PDU on."""
        self._staging.park_by(self.fail)
        self._stream.on_room_purged(self._purged.note)
        self._stream.on_user_redacted(self._redacted.note)

    async def load(self) -> None:
        """Has what was acknowledged before a restart processed without waiting for others.

        Raises:
            NewerLayoutError: a later version of the module made the table.
        """
        try:
            await migrate(self._homeserver, self._table)
        except NewerLayoutError:
            self._writer.switch_off()
            raise
        self._purged.load()
        await self._writer.load()
        self._staging.begin_on_staged_pdus()
        if self._staging.receives:
            self._redacted.load()
            self._try_within(0)

    # Parking

    async def fail(self, pdu: ParkedPdu, staged: StagedPdu, why: str, verdict: Verdict) -> None:
        """Parks or drops a PDU that Synapse is about to drop, or has in memory only.

        There is one attempt to write it into the table; then it stays staged until that goes well.

        Args:
            why: for the log.
            verdict: whether the reason passes.
        """
        if verdict is Verdict.REFUSED:
            await self._writer.drop(pdu, why)
        else:
            await self._writer.park(ToPark(pdu, staged, why, verdict is Verdict.UNKNOWN))

    def _on_parked(self) -> None:
        self._try_within(_BACKOFF.min_ms)

    # Trying again

    def _try_within(self, delay_ms: int) -> None:
        """Tries the parked PDUs that are due, at the latest after this time."""
        at_ms = self._homeserver.steady_ms() + delay_ms
        if self._timer is not None and self._timer.active():
            if self._timer_due_ms <= at_ms:
                return
            self._timer.cancel()
        self._timer_due_ms = at_ms
        self._timer = self._homeserver.call_later(delay_ms, "try_parked_pdus", self._try_due)

    async def _try_due(self) -> None:
        if self._is_trying:
            self._try_within(_CHECK_AFTER_MS)
            return
        self._is_trying = True
        delay_ms = _BACKOFF.after(self._failures_to_try + 1)
        try:
            now_ms = self._homeserver.steady_ms()
            for pair, until_ms in [*self._put_off_ms.items()]:
                if until_ms <= now_ms:
                    del self._put_off_ms[pair]
            absent_from = []
            for origin, room_id in await self._table.due(self._put_off_ms):
                try:
                    if not await self._try_room(origin, room_id):
                        absent_from.append(room_id)
                except Exception:
                    # The PDUs of other origins and rooms do not wait for these.
                    logger.exception("Could not stage PDUs of %s for %s again", origin, room_id)
                    await self._postpone(origin, room_id)
            self._purged.note(*absent_from)
            next_ms = await self._table.next_due_ms()
            wait_ms = _POLL_MS if next_ms is None else next_ms - self._homeserver.now_ms()
            if wait_ms > LONGEST_MS:
                wait_ms = 0  # the clock was set back since
            delay_ms = min(max(wait_ms, _CHECK_AFTER_MS), _POLL_MS)
            self._failures_to_try = 0
        except Exception:
            self._failures_to_try += 1
            logger.exception("Could not stage parked PDUs, trying again in %d ms", delay_ms)
        finally:
            self._is_trying = False
            self._try_within(delay_ms)

    async def _postpone(self, origin: str, room_id: str) -> None:
        try:
            await self._table.postpone(origin, room_id, _AFTER_FAILURE_MS)
        except Exception:
            # Here they are put off all the same, or they would come first again at once.
            logger.info("Could not put off PDUs of %s for %s", origin, room_id, exc_info=True)
            self._put_off_ms[origin, room_id] = self._homeserver.steady_ms() + _AFTER_FAILURE_MS

    async def _try_room(self, origin: str, room_id: str) -> bool:
        """Gives whether this server is in the room."""
        now_ms = self._homeserver.now_ms()
        parked = await self._table.of_room(origin, room_id)
        if self._staging.is_joining(room_id) or not await self._rooms.is_in_room(room_id):
            # Until the room is joined Synapse would drop all, or have them in memory only.
            await self._table.stage_again(
                *(origin, room_id, []),
                ended=[pdu for pdu in parked if pdu.until_ms <= now_ms],
                due_ms={pdu: _next_ms(pdu, now_ms) for pdu in parked},
                stage_txn=self._staging.stage_txn,
            )
            return False
        prevs = {prev for pdu in parked for prev in pdu.prev_event_ids}
        persisted = await self._staging.persisted({*prevs, *(pdu.event_id for pdu in parked)})
        ended: list[ScheduledPdu] = []
        left: list[ScheduledPdu] = []
        for pdu in parked:
            is_over = pdu.event_id in persisted or pdu.until_ms <= now_ms
            (ended if is_over else left).append(pdu)
        counted = [pdu for pdu in left if pdu.tries]
        left = [pdu for pdu in left if not pdu.tries]
        to_stage = self._complete(origin, left, persisted)
        complete = {pdu.event_id for pdu in to_stage}
        others = [pdu for pdu in left if pdu.event_id not in complete]
        # These are tried when they are due, and no more often.
        to_stage += [pdu for pdu in counted if pdu.is_due(now_ms)]
        due_ms = {pdu: _next_ms(pdu, now_ms) for pdu in to_stage}
        if others:
            oldest = others[0]
            again_ms = oldest.due_ms
            if oldest.is_due(now_ms):
                turn = (now_ms - oldest.received_ts_ms) // _TURN_MS
                to_stage.append(others[-1 - turn // 2 % len(others)] if turn % 2 else oldest)
                due_ms[oldest] = _next_ms(oldest, now_ms)
                again_ms = now_ms + _CHECK_AFTER_MS
            due_ms.update((pdu, again_ms) for pdu in others[1:])
        await self._table.stage_again(
            *(origin, room_id, to_stage),
            ended=ended,
            due_ms=due_ms,
            stage_txn=self._staging.stage_txn,
        )
        if to_stage:
            await self._staging.process(room_id)
        return True

    def _complete(
        self, origin: str, parked: Sequence[ScheduledPdu], persisted: set[str]
    ) -> list[ScheduledPdu]:
        """The PDUs that lack no prev_events: these are persisted, or come before the PDU in the
        result. No PDU is given a second time, as it may fail for ever."""
        available = set(persisted)
        complete = []
        for pdu in parked:
            key = (origin, pdu.event_id)
            if key not in self._tried and available.issuperset(pdu.prev_event_ids):
                complete.append(pdu)
                available.add(pdu.event_id)
                self._tried[key] = None
        while len(self._tried) > _MOST_TRIED:
            self._tried.popitem(last=False)
        return complete


def _next_ms(pdu: ScheduledPdu, now_ms: int) -> int:
    waited_ms = now_ms - pdu.received_ts_ms
    return now_ms + min(max(waited_ms // 2, _BACKOFF.min_ms), _BACKOFF.max_ms)
