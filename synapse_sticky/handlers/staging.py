"""What was acknowledged is not dropped: sticky events stay in the inbound staging area (L3), until
they are processed.

If the event persister or the database fails, or the prev_events of one cannot be fetched, as who
has them is away, Synapse drops it; so it does while the room is being joined, but for what comes to
the process that joins it, which a crash drops. Such a PDU is kept in a table and staged again from
time to time, by whichever process comes to it, until it is persisted or expired. Those whose
prev_events are there are tried all at once, but only once. Of the others, that came from one server
for one room, it is one at a time: who does not answer when asked for prev_events holds the room up,
and some may fail whatever is done. It is the oldest, as they are a chain more often than not; if
that is of no avail others in turns, the newest first, on whose way Synapse fetches those before it.

Fails open: if the pruning cannot be decided, nothing is pruned this time.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence

from synapse_sticky._core import sticky_duration_ms, sticky_until_ms
from synapse_sticky.homeserver import Cancellable, Homeserver, IncompletePdu, StagedEvent
from synapse_sticky.storage import Storage, WaitingPdu

logger = logging.getLogger(__name__)

_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000
_ATTEMPTS = 12
"""About seven minutes, and how long each takes. The room's other PDUs wait meanwhile, so it is not
to be for ever."""

_LOOK_AGAIN_MS = 1_000
"""After an attempt: by then it has gone well, or the other server does not answer."""

_TURN_MS = 60_000
"""How long the oldest is tried, and then another one."""

_MAX_TRIED = 10_000

_POLL_MS = 60_000
"""Another process may have set PDUs aside, and be gone."""

_AFTER_FAILURE_MS = 10_000
"""When one server's PDUs of a room are looked at again, if something is wrong with them."""

_STARTS_WITHIN_MS = 30_000
"""How long a PDU waits for the table after the process has started."""


class StagingHandler:
    """Keeps unexpired sticky PDUs out of Synapse's pruning of staged PDUs, and has those processed
    again that a failing database or process, or missing prev_events, got in the way of."""

    def __init__(self, homeserver: Homeserver, storage: Storage) -> None:
        self._hs = homeserver
        self._storage = storage
        self._has_table = False
        self._began_ms = 0
        self._timer: Cancellable | None = None
        self._looks_at_ms = 0
        self._looking = False
        # What was tried by this process when its prev_events were there.
        self._tried: OrderedDict[tuple[str, str], None] = OrderedDict()

    def start(self) -> None:
        """Takes effect from the next PDU on."""
        self._began_ms = self._hs.now_ms()
        self._hs.staging.keep_from_pruning(self.keep)
        self._hs.staging.retry_processing(self.try_again_ms)
        self._hs.staging.set_aside(self.set_aside)

    async def begin(self) -> None:
        """What was acknowledged before a restart is processed without waiting for others."""
        self._has_table = True
        self._hs.staging.process_what_is_left()
        if self._hs.inbound.receives:
            self._look_in(0)

    def keep(self, staged: StagedEvent) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        return self._until_ms(staged) > self._hs.now_ms()

    @staticmethod
    def _until_ms(staged: StagedEvent) -> int:
        duration_ms = sticky_duration_ms(staged.sticky_field)
        origin_server_ts_ms = staged.origin_server_ts
        if duration_ms is None or not isinstance(origin_server_ts_ms, int):
            return 0
        return sticky_until_ms(duration_ms, origin_server_ts_ms, staged.received_ts_ms)

    def try_again_ms(self, staged: StagedEvent, failures: int) -> int | None:
        """How long to wait before the PDU is processed again; None for not any more."""
        if failures >= _ATTEMPTS or not self.keep(staged):
            return None
        return _delay_ms(failures)

    # PDUs that cannot be persisted for now

    async def set_aside(self, pdu: IncompletePdu, staged: StagedEvent, why: str) -> None:
        """Keeps a PDU that Synapse is about to drop, or holds in memory only, until it is
        persisted or expired."""
        while not self._has_table:
            # It is being made; or is of a later version of the module, and will not be there.
            if self._hs.now_ms() - self._began_ms >= _STARTS_WITHIN_MS:
                logger.warning("There is no table yet, not keeping the sticky PDU %s", pdu.event_id)
                return
            await self._hs.sleep_ms(_RETRY_MIN_MS)
        failures = 0
        while self.keep(staged):
            due_ms = self._hs.now_ms() + _RETRY_MIN_MS
            try:
                if await self._storage.set_aside(pdu, self._until_ms(staged), due_ms):
                    logger.info("Keeping the sticky PDU %s: %s", pdu.event_id, why)
                else:
                    logger.warning(
                        "Too many sticky PDUs of %s are kept, not keeping %s: %s",
                        *(pdu.origin, pdu.event_id, why),
                    )
            except Exception:
                failures += 1
                if failures == _ATTEMPTS:
                    raise
                logger.exception("Could not set the sticky PDU %s aside yet", pdu.event_id)
                await self._hs.sleep_ms(_delay_ms(failures))
            else:
                self._look_in(_RETRY_MIN_MS)
                return

    def _look_in(self, delay_ms: int) -> None:
        """Looks at the PDUs that are due, at the latest after this time."""
        at_ms = self._hs.now_ms() + delay_ms
        if self._timer is not None and self._timer.active():
            if self._looks_at_ms <= at_ms:
                return
            self._timer.cancel()
        self._looks_at_ms = at_ms
        self._timer = self._hs.call_later(delay_ms, "look_at_incomplete_pdus", self._look)

    async def _look(self) -> None:
        if self._looking:
            self._look_in(_LOOK_AGAIN_MS)
            return
        self._looking = True
        delay_ms = _RETRY_MIN_MS
        try:
            for origin, room_id in await self._storage.due_incomplete():
                try:
                    await self._look_at(origin, room_id)
                except Exception:
                    # Those of others need not wait for them.
                    logger.exception("Could not stage PDUs of %s for %s again", origin, room_id)
                    await self._storage.postpone_incomplete(origin, room_id, _AFTER_FAILURE_MS)
            next_ms = await self._storage.next_incomplete_ms()
            wait_ms = _POLL_MS if next_ms is None else next_ms - self._hs.now_ms()
            delay_ms = min(max(wait_ms, _LOOK_AGAIN_MS), _POLL_MS)
        except Exception:
            logger.exception("Could not stage PDUs again, trying again in %d ms", delay_ms)
        finally:
            self._looking = False
            self._look_in(delay_ms)

    async def _look_at(self, origin: str, room_id: str) -> None:
        now_ms = self._hs.now_ms()
        waiting = await self._storage.incomplete(origin, room_id)
        if self._hs.staging.holds_up(room_id) or not await self._hs.rooms.is_in_room(room_id):
            # Until it is joined all would be dropped once more, or held in memory once more.
            await self._storage.stage_again(
                *(origin, room_id, []),
                over=[pdu.event_id for pdu in waiting if pdu.until_ms <= now_ms],
                due={pdu.event_id: _next_ms(pdu, now_ms) for pdu in waiting},
            )
            return
        prevs = {prev for pdu in waiting for prev in pdu.prev_event_ids}
        there = await self._hs.staging.persisted({*prevs, *(pdu.event_id for pdu in waiting)})
        over = [pdu for pdu in waiting if pdu.event_id in there or pdu.until_ms <= now_ms]
        left = [pdu for pdu in waiting if pdu not in over]
        staged = self._complete(origin, left, there)
        due = {pdu.event_id: _next_ms(pdu, now_ms) for pdu in staged}
        others = [pdu for pdu in left if pdu not in staged]
        if others:
            oldest = others[0]
            look_ms = oldest.due_ms
            if oldest.due_ms <= now_ms:
                turn = (now_ms - oldest.received_ts_ms) // _TURN_MS
                staged.append(others[-1 - turn // 2 % len(others)] if turn % 2 else oldest)
                due[oldest.event_id] = _next_ms(oldest, now_ms)
                look_ms = now_ms + _LOOK_AGAIN_MS
            due.update((pdu.event_id, look_ms) for pdu in others[1:])
        await self._storage.stage_again(
            origin,
            room_id,
            [pdu.event_id for pdu in staged],
            over=[pdu.event_id for pdu in over],
            due=due,
        )
        if staged:
            await self._hs.staging.process(room_id)

    def _complete(
        self, origin: str, waiting: Sequence[WaitingPdu], there: set[str]
    ) -> list[WaitingPdu]:
        """Those whose prev_events are there, or come before them among these; none a second time,
        as nothing says then that it goes well."""
        there = set(there)
        complete = []
        for pdu in waiting:
            key = (origin, pdu.event_id)
            if key not in self._tried and there.issuperset(pdu.prev_event_ids):
                complete.append(pdu)
                there.add(pdu.event_id)
                self._tried[key] = None
        while len(self._tried) > _MAX_TRIED:
            self._tried.popitem(last=False)
        return complete


def _next_ms(pdu: WaitingPdu, now_ms: int) -> int:
    waited_ms = now_ms - pdu.received_ts_ms
    return now_ms + min(max(waited_ms // 2, _RETRY_MIN_MS), _RETRY_MAX_MS)


def _delay_ms(failures: int) -> int:
    return int(min(_RETRY_MIN_MS * 2 ** (failures - 1), _RETRY_MAX_MS))
