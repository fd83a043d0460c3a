"""Sticky events of other servers that are past a limit are delivered later (L1, L4, L5, L7, D7).

When Synapse persists an event, this duty decides once, in the same transaction, whether the event
is delivered now or deferred. The event is charged to its sender's server, whichever server sent it
here. A released event enters Synapse's sticky events stream as if it were new. ``ReleaseQueue``
says in which order. The database has the truth; the queue is filled from it at the start.

Fails open: an event is delivered now if this duty cannot decide on it.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import attr

from synapse_sticky import metrics
from synapse_sticky._core import ReleaseQueue
from synapse_sticky.backoff import Backoff
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.homeserver import Cancellable, Cursor, Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Stream
from synapse_sticky.limits import LimitReport, federation_limiter, per_second

if TYPE_CHECKING:
    from synapse_sticky.handlers.deferral.tables import DeferredTable

logger = logging.getLogger(__name__)

_BATCH = 50
_EXPIRE_BATCH = 500
_PAUSE_MS = 20
"""The least time between two releases. A flood then does not cost a transaction an event."""
_BACKOFF = Backoff(1_000, 60_000)
_MAX_DECISIONS = 10_000


@attr.s(auto_attribs=True, frozen=True, slots=True)
class NewStickyEvent:
    """An event that is about to enter the sticky events stream.

    event_stream_ordering: its position in the stream of all events.
    """

    event_id: str
    room_id: str
    sender: str
    expires_at_ms: int
    event_stream_ordering: int


DeferTxn = Callable[[Cursor, Sequence[NewStickyEvent]], Collection[str]]
"""Gives the IDs of those of the events that are not to enter the stream now."""


class Writer(Protocol):
    """Synapse's way into the sticky events stream, in a process that persists events."""

    def handles(self, room_id: str) -> bool:
        """Does this very process persist the room's events?"""

    def defer_by(self, defer_txn: DeferTxn) -> None:
        """From now on calls ``defer_txn`` in each transaction that would enter deliverable events
        into the stream, and enters only the others.

        Synapse may try the transaction again. Then it is called again for the same events. If it
        raises, the transaction fails.
        """

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        """Enters events into the stream as new, in this order. Leaves out those that were purged,
        and those that are in the stream."""

    async def still_sticky(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are there and not redacted, rejected or soft-failed (S5)."""

    def wake(self, room_ids: Collection[str]) -> None:
        """Has Synapse answer the waiting syncs of the members of these rooms."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Deferred:
    """An event that is to be deferred, and the limit that it is past."""

    event: NewStickyEvent
    server: str
    limit: str


class DeferralHandler:
    """Defers and releases events of the rooms whose events this process persists."""

    def __init__(
        self,
        homeserver: Homeserver,
        writer: Writer,
        table: "DeferredTable",
        stream: Stream,
        config: FederationConfig,
        report: LimitReport,
    ) -> None:
        self._homeserver = homeserver
        self._writer = writer
        self._table = table
        self._stream = stream
        self._config = config
        self._report = report
        self._is_exempt = config.exempts()
        self._limiter = federation_limiter(config)
        self._queue = ReleaseQueue()
        self._is_loaded = False
        # Synapse persists events in database threads.
        self._lock = threading.Lock()
        # Decisions of transactions that are not through, by event ID: they may be tried again.
        self._decisions: OrderedDict[str, str | None] = OrderedDict()
        # Out of the queue and charged, but still in the table.
        self._taken: list[str] = []
        # Out of the queue as they have expired, but still in the table.
        self._expired: list[str] = []
        # Deferred events that may not be sticky any more.
        self._dirty: set[str] = set()
        self._timer: Cancellable | None = None
        self._timer_due_ms = 0
        self._is_releasing = False
        self._failures = 0
        self._not_before_ms = 0

    def install(self) -> None:
        """Takes effect once the deferred events are loaded. In mode ``off`` none is added."""
        if self._config.mode is not Mode.OFF:
            self._writer.defer_by(self.defer_txn)
        self._stream.on_event_changed(self._event_changed)

    async def load(self) -> None:
        """Takes up the deferred events of an earlier run.

        Raises:
            NewerLayoutError: a later version of the module made the table.
        """
        await migrate(self._homeserver, self._table)
        after = ""
        while page := await self._table.page(after):
            for event, server in page:
                if self._writer.handles(event.room_id):
                    self._add(event, server)
            after = page[-1][0].event_id
        self._is_loaded = True
        if len(self._queue):
            logger.info("%d sticky events of an earlier run are still deferred", len(self._queue))
        self._schedule()

    # Deferring, in database threads

    def defer_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        """Adds to the table those of the new events that are past a limit, and gives their IDs.

        An error of the database fails the transaction, as it would without this module.
        """
        if not self._is_loaded or not events:
            return ()
        try:
            deferred = self._decide(events)
        except Exception:
            logger.exception("Could not decide on %d sticky events, delivering them", len(events))
            return ()
        # Also if none is deferred: a decision is not needed any more once it is final.
        txn.call_after(self._committed, [event.event_id for event in events], deferred)
        if deferred:
            self._table.insert_txn(txn, [(new.event, new.server) for new in deferred])
        return {new.event.event_id for new in deferred}

    def _decide(self, events: Sequence[NewStickyEvent]) -> list[_Deferred]:
        deferred = []
        with self._lock:
            for event in events:
                server = event.sender.partition(":")[2]
                if server == self._homeserver.server_name or self._is_exempt(server):
                    continue
                if (limit := self._limit_past(event, server)) is not None:
                    deferred.append(_Deferred(event, server, limit))
        return deferred

    def _limit_past(self, event: NewStickyEvent, server: str) -> str | None:
        """The limit that the event is past. Decided once, however often it is persisted."""
        if event.event_id in self._decisions:
            return self._decisions[event.event_id]
        limit = self._queue.admit(
            self._limiter, event.room_id, server, event.sender, self._homeserver.now_ms()
        )
        self._decisions[event.event_id] = limit
        if len(self._decisions) > _MAX_DECISIONS:
            self._decisions.popitem(last=False)
        return limit

    def _committed(self, event_ids: list[str], deferred: list[_Deferred]) -> None:
        # Called for each attempt of the transaction: what is done here can be done twice.
        with self._lock:
            for event_id in event_ids:
                self._decisions.pop(event_id, None)
        for new in deferred:
            if self._add(new.event, new.server):
                count = self._queue.waiting(new.server)
                delay_ms = round(count * 1000 / per_second(self._config, new.limit))
                self._report.deferred(new.limit, new.server, new.event.room_id, count, delay_ms)
        if deferred:
            self._schedule()

    def _add(self, event: NewStickyEvent, server: str) -> bool:
        with self._lock:
            added = self._queue.add(
                event.event_id, event.room_id, server, event.sender, event.expires_at_ms
            )
            metrics.DEFERRED_NOW.set(len(self._queue))
        return added

    # Releasing

    def _schedule(self) -> None:
        if not self._is_loaded or self._is_releasing:
            return
        now_ms = self._homeserver.now_ms()
        is_due = self._dirty or self._taken or self._expired
        due_ms = now_ms if is_due else self._queue.next_due_ms(now_ms)
        if due_ms is None:
            return
        # The clock may have been set back since a failure.
        not_before_ms = min(self._not_before_ms, now_ms + _BACKOFF.max_ms)
        due_ms = max(due_ms, now_ms + _PAUSE_MS, not_before_ms)
        if self._timer is not None and self._timer.active():
            # Never postponed: a flood faster than the pause would postpone it for ever.
            if self._timer_due_ms <= due_ms:
                return
            self._timer.cancel()
        self._timer_due_ms = due_ms
        self._timer = self._homeserver.call_later(due_ms - now_ms, "release", self._release)

    async def _release(self) -> None:
        if self._is_releasing:
            return
        self._is_releasing = True
        try:
            while await self._drop_some():
                pass
            await self._release_some()
            self._failures = 0
            self._not_before_ms = 0
        except Exception:
            self._failures += 1
            delay_ms = _BACKOFF.after(self._failures)
            logger.exception("Could not release sticky events, trying again in %d ms", delay_ms)
            self._not_before_ms = self._homeserver.now_ms() + delay_ms
        finally:
            self._is_releasing = False
            self._schedule()

    async def _release_some(self) -> None:
        if not self._taken:
            with self._lock:
                self._taken = self._queue.take(self._limiter, self._homeserver.now_ms(), _BATCH)
                metrics.DEFERRED_NOW.set(len(self._queue))
        if not self._taken:
            return
        still_sticky = await self._writer.still_sticky(self._taken)
        rooms = await self._table.release(self._taken, still_sticky, self._writer.enter_txn)
        metrics.RELEASED.inc(len(still_sticky))
        self._taken = []
        self._writer.wake(rooms)

    async def _drop_some(self) -> bool:
        """Drops some of the events that are not to be released. Gives whether there may be more."""
        return await self._drop_expired() or await self._drop_redacted()

    async def _drop_expired(self) -> bool:
        if not self._expired:
            with self._lock:
                self._expired = self._queue.expire(self._homeserver.now_ms(), _EXPIRE_BATCH)
                metrics.DEFERRED_NOW.set(len(self._queue))
            if not self._expired:
                return False
            self._report.expired(self._expired)
        await self._table.drop(self._expired)
        self._expired = []
        return True

    def _event_changed(self, event_id: str) -> None:
        if event_id in self._queue:
            self._dirty.add(event_id)
            self._schedule()

    async def _drop_redacted(self) -> bool:
        dirty = list(self._dirty)[:_BATCH]
        if not dirty:
            return False
        still_sticky = await self._writer.still_sticky(dirty)
        gone = [event_id for event_id in dirty if event_id not in still_sticky]
        if gone:
            await self._table.drop(gone)
        with self._lock:
            for event_id in gone:
                self._queue.remove(event_id)
            metrics.DEFERRED_NOW.set(len(self._queue))
        self._dirty.difference_update(dirty)
        return True
