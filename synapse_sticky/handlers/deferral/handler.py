"""Sticky events of other servers that are past a limit are delivered later (L1, L4, L5, L7, D7).

When Synapse persists an event, this duty decides once, in the same transaction, whether the event
is delivered now or deferred. The event is charged to its sender's server, whichever server sent it
here. A released event enters Synapse's sticky events stream as if it were new. ``ReleaseQueue``
says in which order. The database has the truth; the queue is filled from it at the start.

Fails open: an event is delivered now if this duty cannot decide on it.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import attr

from synapse_sticky import metrics
from synapse_sticky.backoff import Backoff
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.handlers.deferral.alarm import Alarm
from synapse_sticky.handlers.deferral.waiting import PastLimit, Waiting
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Stream
from synapse_sticky.limits import LimitReport

if TYPE_CHECKING:
    from synapse_sticky.handlers.deferral.tables import DeferredTable

logger = logging.getLogger(__name__)

RELEASE_BATCH = 50
EXPIRE_BATCH = 500
PAUSE_MS = 20
"""The least time between two releases. A flood then does not cost a transaction an event."""
_BACKOFF = Backoff(1_000, 60_000)


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

    def attempt_txn(self, txn: Cursor, change: Callable[[], None]) -> Exception | None:
        """Calls ``change``; gives the error if the database refuses its statements.

        Then these are undone, and the transaction goes on. Any other error of the database fails
        the transaction.
        """

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        """Enters events into the stream as new, in this order. Leaves out those that were purged,
        and those that are in the stream."""

    async def still_sticky(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that are there and not redacted, rejected or soft-failed (S5)."""

    def wake(self, room_ids: Collection[str]) -> None:
        """Has Synapse answer the waiting syncs of the members of these rooms."""


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
        self._waiting = Waiting(homeserver, config, report)
        self._alarm = Alarm(homeserver, "release", self._release)
        self._is_loaded = False
        # Out of the queue and charged, but still in the table.
        self._taken: list[str] = []
        # Out of the queue as they have expired, but still in the table.
        self._expired: list[str] = []
        # Deferred events that may not be sticky any more.
        self._dirty: set[str] = set()
        self._is_releasing = False
        self._failures = 0
        self._not_before_ms = 0
        self._refusals = 0
        self._no_insert_before_ms = 0

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
                    self._waiting.add(event, server)
            after = page[-1][0].event_id
        self._is_loaded = True
        if count := len(self._waiting):
            logger.info("%d sticky events of an earlier run are still deferred", count)
        self._schedule()

    # Deferring, in database threads

    def defer_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        """Adds to the table those of the new events that are past a limit, and gives their IDs.

        None of them if the database does not take the rows, as when somebody took away the right
        to write them. What fails a transaction without this module fails this one, too.
        """
        if not self._is_loaded or not events:
            return ()
        try:
            deferred = self._waiting.decide(events)
        except Exception:
            logger.exception("Could not decide on %d sticky events, delivering them", len(events))
            return ()
        if deferred and not self._insert_txn(txn, deferred):
            deferred = []
        # Also if none is deferred: a decision is not needed any more once it is final.
        txn.call_after(self._waiting.committed, events, deferred)
        if deferred:
            txn.call_after(self._schedule)
        return {new.event.event_id for new in deferred}

    def _insert_txn(self, txn: Cursor, deferred: Sequence[PastLimit]) -> bool:
        """Gives whether the database took the rows. Does not ask again for a while if not."""
        now_ms = self._homeserver.now_ms()
        # The clock may have been set back since then.
        if now_ms < min(self._no_insert_before_ms, now_ms + _BACKOFF.max_ms):
            return False
        rows = [(new.event, new.server) for new in deferred]
        problem = self._writer.attempt_txn(txn, lambda: self._table.insert_txn(txn, rows))
        if problem is None:
            self._refusals = 0
            return True
        self._refusals += 1
        delay_ms = _BACKOFF.after(self._refusals)
        self._no_insert_before_ms = now_ms + delay_ms
        logger.error(
            "Could not defer %d sticky events, so they are delivered now, and so are all that come"
            " in the next %d ms: %s",
            len(rows),
            delay_ms,
            str(problem).strip(),
        )
        return False

    # Releasing

    def _schedule(self) -> None:
        if not self._is_loaded or self._is_releasing:
            return
        now_ms = self._homeserver.now_ms()
        is_due = self._dirty or self._taken or self._expired
        due_ms = now_ms if is_due else self._waiting.next_due_ms()
        if due_ms is None:
            return
        # The clock may have been set back since a failure.
        not_before_ms = min(self._not_before_ms, now_ms + _BACKOFF.max_ms)
        self._alarm.ring_at(max(due_ms, now_ms + PAUSE_MS, not_before_ms))

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
            self._taken = self._waiting.take(RELEASE_BATCH)
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
            self._expired = self._waiting.expire(EXPIRE_BATCH)
            if not self._expired:
                return False
            self._report.expired(self._expired)
        await self._table.drop(self._expired)
        self._expired = []
        return True

    def _event_changed(self, event_id: str) -> None:
        if event_id in self._waiting:
            self._dirty.add(event_id)
            self._schedule()

    async def _drop_redacted(self) -> bool:
        dirty = list(self._dirty)[:RELEASE_BATCH]
        if not dirty:
            return False
        still_sticky = await self._writer.still_sticky(dirty)
        gone = [event_id for event_id in dirty if event_id not in still_sticky]
        if gone:
            await self._table.drop(gone)
        self._waiting.remove(gone)
        self._dirty.difference_update(dirty)
        return True
