"""Sticky events of other servers that are past a limit are delivered later (L1, L4, L5, L7, D7).

Where an event is persisted it is decided, once, whether it is delivered now or waits; in the same
transaction. It is charged to its sender's server, whoever handed it on. What waits enters Synapse's
sticky events stream as if it had just come, in the order of ``ReleaseQueue``. The database has the
truth; the queue is made from it at the start.

Fails open: an event that cannot be decided on is delivered now.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence

from synapse_sticky import metrics
from synapse_sticky._core import ReleaseQueue
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.homeserver import Cancellable, Cursor, Homeserver, NewStickyEvent
from synapse_sticky.limits import LimitReport, federation_limiter, per_second
from synapse_sticky.storage import Storage

logger = logging.getLogger(__name__)

_BATCH = 50
_EXPIRE_BATCH = 500
_PAUSE_MS = 20
"""At least this long between releases, so that a flood does not cost a transaction an event."""
_RETRY_MIN_MS = 1_000
_RETRY_MAX_MS = 60_000
_DECISIONS = 10_000


class DeferralHandler:
    """Defers and releases, for the rooms whose events this process persists."""

    def __init__(
        self,
        homeserver: Homeserver,
        storage: Storage,
        config: FederationConfig,
        report: LimitReport,
    ) -> None:
        self._hs = homeserver
        self._storage = storage
        self._config = config
        self._report = report
        self._is_exempt = config.exempts()
        self._limiter = federation_limiter(config)
        self._queue = ReleaseQueue()
        # Events are persisted in database threads.
        self._lock = threading.Lock()
        # Decisions whose transaction has not come through, by event ID: it may be tried again.
        self._decisions: OrderedDict[str, str | None] = OrderedDict()
        # Taken from the queue and paid for, but not released yet.
        self._taken: list[str] = []
        self._redacted: set[str] = set()
        # Out of the queue, as expired, and still in the table.
        self._expired: list[str] = []
        self._timer: Cancellable | None = None
        self._timer_due_ms = 0
        self._not_before_ms = 0
        self._running = False
        self._retry_ms = _RETRY_MIN_MS

    async def start(self) -> None:
        """Takes up what waits since an earlier run, and decides on new events from now on; in
        mode ``off`` only the former, all of which is released."""
        if self._config.mode is not Mode.OFF:
            self._hs.writer.hold_back(self.hold_txn)
        self._hs.stream.on_event_changed(self._event_changed)
        after = ""
        while page := await self._storage.deferred(after):
            for event, server in page:
                if self._hs.writer.handles(event.room_id):
                    self._add(event, server)
            after = page[-1][0].event_id
        if len(self._queue):
            logger.info("%d deferred sticky events wait since an earlier run", len(self._queue))
        self._schedule()

    # Deciding, in database threads

    def hold_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        """The IDs of the new events that are to wait; they are in the table with that."""
        held: list[tuple[NewStickyEvent, str, str]] = []
        with self._lock:
            for event in events:
                server = _server_of(event.sender)
                if server == self._hs.server_name or self._is_exempt(server):
                    continue
                limit = self._decide(event, server)
                if limit is not None:
                    held.append((event, server, limit))
        # Whatever becomes of it: a decision that is final is not to be remembered.
        txn.call_after(self._committed, [event.event_id for event in events], held)
        if held:
            self._storage.defer_txn(txn, [(event, server) for event, server, _ in held])
        return {event.event_id for event, _, _ in held}

    def _decide(self, event: NewStickyEvent, server: str) -> str | None:
        """The limit in the way of the event. Decided once, however often it is persisted."""
        if event.event_id in self._decisions:
            return self._decisions[event.event_id]
        limit = self._queue.admit(
            self._limiter, event.room_id, server, event.sender, self._hs.now_ms()
        )
        self._decisions[event.event_id] = limit
        if len(self._decisions) > _DECISIONS:
            self._decisions.popitem(last=False)
        return limit

    def _committed(self, event_ids: list[str], held: list[tuple[NewStickyEvent, str, str]]) -> None:
        # Called for each attempt of the transaction: what is done here can be done twice.
        with self._lock:
            for event_id in event_ids:
                self._decisions.pop(event_id, None)
        for event, server, limit in held:
            if self._add(event, server):
                waiting = self._queue.waiting(server)
                wait_ms = round(waiting * 1000 / per_second(self._config, limit))
                self._report.deferred(limit, server, event.room_id, waiting, wait_ms)
        if held:
            self._schedule()

    def _add(self, event: NewStickyEvent, server: str) -> bool:
        with self._lock:
            added = self._queue.add(
                event.event_id, event.room_id, server, event.sender, event.expires_at_ms
            )
            metrics.WAITING.set(len(self._queue))
        return added

    # Releasing

    def _schedule(self) -> None:
        if self._running:
            return
        now_ms = self._hs.now_ms()
        is_due = self._redacted or self._taken or self._expired
        due_ms = now_ms if is_due else self._queue.next_due_ms(now_ms)
        if due_ms is None:
            return
        # The clock may have been set back since a failure.
        not_before_ms = min(self._not_before_ms, now_ms + _RETRY_MAX_MS)
        due_ms = max(due_ms, now_ms + _PAUSE_MS, not_before_ms)
        if self._timer is not None and self._timer.active():
            # Never put off: a flood faster than the pause would put it off for ever.
            if self._timer_due_ms <= due_ms:
                return
            self._timer.cancel()
        self._timer_due_ms = due_ms
        self._timer = self._hs.call_later(due_ms - now_ms, "release", self._release)

    async def _release(self) -> None:
        if self._running:
            return
        self._running = True
        try:
            while await self._drop_gone():
                pass
            await self._release_some()
            self._retry_ms = _RETRY_MIN_MS
            self._not_before_ms = 0
        except Exception:
            logger.exception(
                "Could not release sticky events, trying again in %d ms", self._retry_ms
            )
            self._not_before_ms = self._hs.now_ms() + self._retry_ms
            self._retry_ms = min(self._retry_ms * 2, _RETRY_MAX_MS)
        finally:
            self._running = False
            self._schedule()

    async def _release_some(self) -> None:
        if not self._taken:
            with self._lock:
                self._taken = self._queue.take(self._limiter, self._hs.now_ms(), _BATCH)
                metrics.WAITING.set(len(self._queue))
        if not self._taken:
            return
        still_sticky = await self._hs.writer.still_sticky(self._taken)
        rooms = await self._storage.release(self._taken, still_sticky)
        metrics.RELEASED.inc(len(still_sticky))
        self._taken = []
        self._hs.writer.wake(rooms)

    async def _drop_gone(self) -> bool:
        """Some of what is not to be released any more; whether there may be others."""
        return await self._drop_expired() or await self._drop_redacted()

    async def _drop_expired(self) -> bool:
        if not self._expired:
            with self._lock:
                self._expired = self._queue.expire(self._hs.now_ms(), _EXPIRE_BATCH)
                metrics.WAITING.set(len(self._queue))
            if not self._expired:
                return False
            self._report.expired(self._expired)
        await self._storage.drop_deferred(self._expired)
        self._expired = []
        return True

    def _event_changed(self, event_id: str) -> None:
        if event_id in self._queue:
            self._redacted.add(event_id)
            self._schedule()

    async def _drop_redacted(self) -> bool:
        """What is no longer sticky waits no longer (S5)."""
        suspects = list(self._redacted)[:_BATCH]
        if not suspects:
            return False
        still_sticky = await self._hs.writer.still_sticky(suspects)
        gone = [event_id for event_id in suspects if event_id not in still_sticky]
        if gone:
            await self._storage.drop_deferred(gone)
        with self._lock:
            for event_id in gone:
                self._queue.remove(event_id)
            metrics.WAITING.set(len(self._queue))
        self._redacted.difference_update(suspects)
        return True


def _server_of(user_id: str) -> str:
    return user_id.partition(":")[2]
