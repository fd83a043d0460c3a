"""What was acknowledged is not dropped: sticky events stay in the inbound staging area (L3), until
they are processed.

If the prev_events of one cannot be fetched, as who has them is away, Synapse drops it. It is set
aside instead, so that others need not wait, and processed again from time to time.

Fails open: if the pruning cannot be decided, nothing is pruned this time.
"""

import logging
from collections import Counter

import attr

from synapse_sticky._core import (
    MAX_STICKY_DURATION_MS,
    sticky_duration_ms,
    sticky_until_ms,
)
from synapse_sticky.homeserver import Homeserver, IncompletePdu, StagedEvent
from synapse_sticky.storage import Storage

logger = logging.getLogger(__name__)

_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000
_ATTEMPTS = 12
"""About seven minutes. The room's other PDUs wait meanwhile, so it is not to be for ever."""

_ROUND_MS = 1_000
_IN_ROUND = 50
_MAX_OF_SERVER = 500
_MAX_INCOMPLETE = 5_000
"""What is past these is dropped, as Synapse would."""


@attr.s(auto_attribs=True, slots=True)
class _Incomplete:
    since_ms: int
    due_ms: int | None
    """None while it is staged again."""


class StagingHandler:
    """Keeps unexpired sticky PDUs out of Synapse's pruning of staged PDUs, and has those processed
    again that a failing database or missing prev_events got in the way of."""

    def __init__(self, homeserver: Homeserver, storage: Storage) -> None:
        self._hs = homeserver
        self._storage = storage
        self._incomplete: dict[tuple[str, str], _Incomplete] = {}
        self._of_server: Counter[str] = Counter()
        self._scheduled = False

    def start(self) -> None:
        """Takes effect from the next PDU on."""
        self._hs.staging.keep_from_pruning(self.keep)
        self._hs.staging.retry_processing(self.try_again_ms)

    async def begin(self) -> None:
        """What was acknowledged before a restart is processed without waiting for others."""
        self._hs.staging.set_aside(self.set_aside, self.processed)
        await self._storage.bring_back()
        self._hs.staging.process_what_is_left()

    def keep(self, staged: StagedEvent) -> bool:
        """Is the staged PDU sticky (S1), and unexpired (S2) by when it was received?"""
        duration_ms = sticky_duration_ms(staged.sticky_field)
        origin_server_ts_ms = staged.origin_server_ts
        if duration_ms is None or not isinstance(origin_server_ts_ms, int):
            return False
        until_ms = sticky_until_ms(duration_ms, origin_server_ts_ms, staged.received_ts_ms)
        return until_ms > self._hs.now_ms()

    def try_again_ms(self, staged: StagedEvent, failures: int) -> int | None:
        """How long to wait before the PDU is processed again; None for not any more."""
        if failures >= _ATTEMPTS or not self.keep(staged):
            return None
        return _delay_ms(failures)

    # PDUs that lack prev_events

    async def set_aside(self, pdu: IncompletePdu, staged: StagedEvent) -> None:
        """Keeps a PDU that Synapse is about to drop for later, unless it is expired."""
        key = (pdu.origin, pdu.event_id)
        now_ms = self._hs.now_ms()
        known = self._incomplete.get(key)
        since_ms = known.since_ms if known else now_ms
        waited_ms = now_ms - since_ms
        if not self.keep(staged) or waited_ms > MAX_STICKY_DURATION_MS:
            self._forget(key)
            return
        if known is None and not self._has_room_for(pdu.origin, now_ms):
            logger.warning("Too many PDUs of %s lack prev_events, dropping this one", pdu.origin)
            return
        await self._note(pdu)
        delay_ms = min(max(waited_ms // 2, _RETRY_MIN_MS), _RETRY_MAX_MS)
        logger.info(
            "The prev_events of the sticky PDU %s cannot be fetched, trying again in %d ms",
            pdu.event_id,
            delay_ms,
        )
        if known is None:
            self._of_server[pdu.origin] += 1
        self._incomplete[key] = _Incomplete(since_ms, now_ms + delay_ms)
        self._schedule()

    async def _note(self, pdu: IncompletePdu) -> None:
        failures = 0
        while True:
            try:
                await self._storage.set_aside(pdu)
            except Exception:
                failures += 1
                if failures == _ATTEMPTS:
                    raise
                logger.exception("Could not set the sticky PDU %s aside yet", pdu.event_id)
            else:
                return
            await self._hs.sleep_ms(_delay_ms(failures))

    def processed(self, origin: str, event_id: str) -> None:
        """The PDU lacks nothing, or is not to be taken in."""
        self._forget((origin, event_id))

    def _has_room_for(self, origin: str, now_ms: int) -> bool:
        def is_full() -> bool:
            return (
                self._of_server[origin] >= _MAX_OF_SERVER
                or len(self._incomplete) >= _MAX_INCOMPLETE
            )

        if is_full():
            self._forget_old(now_ms)
        return not is_full()

    def _forget_old(self, now_ms: int) -> None:
        # Those that were staged again and that another process took in.
        for key, incomplete in list(self._incomplete.items()):
            if now_ms - incomplete.since_ms > MAX_STICKY_DURATION_MS:
                self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        if self._incomplete.pop(key, None) is not None:
            self._of_server[key[0]] -= 1
            if not self._of_server[key[0]]:
                del self._of_server[key[0]]

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._hs.call_later(_ROUND_MS, "bring_back", self._round)

    async def _round(self) -> None:
        now_ms = self._hs.now_ms()
        due = [
            key
            for key, incomplete in self._incomplete.items()
            if incomplete.due_ms is not None and incomplete.due_ms <= now_ms
        ][:_IN_ROUND]
        try:
            if due:
                await self._storage.bring_back(due)
                for key in due:
                    if (incomplete := self._incomplete.get(key)) is not None:
                        incomplete.due_ms = None
                self._hs.staging.process()
        except Exception:
            logger.exception("Could not stage PDUs again, trying again in %d ms", _ROUND_MS)
        finally:
            self._scheduled = False
            if any(incomplete.due_ms is not None for incomplete in self._incomplete.values()):
                self._schedule()


def _delay_ms(failures: int) -> int:
    return int(min(_RETRY_MIN_MS * 2 ** (failures - 1), _RETRY_MAX_MS))
