"""Sticky events of other servers that are past a limit are delivered later (L1, L4, L5, L7, D7).

When Synapse persists an event, this duty decides once, in the same transaction, whether the event
is delivered now or deferred. The event is charged to its sender's server, whichever server sent it
here. A released event enters Synapse's sticky events stream as if it were new. ``ReleaseQueue``
says in which order. The database has the truth; the queue is filled from it at the start.

Fails open: an event is delivered now if this duty cannot decide on it.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import attr

from synapse_sticky.apart import Stragglers, apart
from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.handlers.deferral.ordered import Ordered
from synapse_sticky.handlers.deferral.waiting import PastLimit, Waiting
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.homeserver.layout import migrate
from synapse_sticky.index import Stream
from synapse_sticky.limits import LimitReport
from synapse_sticky.logs import bounded
from synapse_sticky.orders import Orders

if TYPE_CHECKING:
    from synapse_sticky.handlers.deferral.tables import DeferredTable

logger = bounded(__name__)

RELEASE_BATCH = 50
EXPIRE_BATCH = 500
PAUSE_MS = 20
"""The least time between two releases. A flood then does not cost a transaction an event."""
_BACKOFF = Backoff(1_000, 60_000)
_MAX_STRAGGLERS = 10_000
"""How many events that cannot be released are tried again; of others the rows are left."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class NewStickyEvent:
    """An event that is about to enter the sticky events stream.

    event_stream_ordering: its position in the stream of all events.
    key: what the event is the state of, hashed; None if that cannot be read.
    newness_ms: the end that its sender claims, in ms since the epoch. Of a key the event with the
        latest is the newest (MSC4354). None if it is not known.
    """

    event_id: str
    room_id: str
    sender: str
    expires_at_ms: int
    event_stream_ordering: int
    key: int | None = None
    newness_ms: int | None = None


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
        """Calls ``change``; gives the error if it fails on its own account.

        So it does if it would wait long for what another transaction has locked. Then its
        statements are undone, and the transaction goes on. A database that is away or has no room
        fails the transaction.
        """

    def enter_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> None:
        """Enters events into the stream as new, in this order. Leaves out those that were purged,
        and those that are in the stream."""

    async def existing(self, event_ids: Collection[str]) -> set[str]:
        """Those of the events that the database has."""

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
        orders: Orders | None = None,
    ) -> None:
        self._homeserver, self._writer = homeserver, writer
        self._table, self._stream = table, stream
        self._config, self._report = config, report
        # Without limits nothing is held, either.
        is_off = config.mode is Mode.OFF
        self._orders = orders = Orders() if orders is None or is_off else orders
        self._waiting = Waiting(
            homeserver, config, report, fill=self._fill, on_whole=self._schedule, orders=orders
        )
        self._ordered = Ordered(
            *(homeserver, orders, table),
            handles=writer.handles,
            remove=self._waiting.remove,
            release=self._release_apart,
            expire=self._expire,
            refill=self._fill,
        )
        self._releasing = Retrying(
            *(homeserver, "release", "Could not release sticky events"),
            *(homeserver.metrics.timed("deferral", "release", self._release), _BACKOFF),
        )
        self._alarm = Alarm(homeserver, "release", self._releasing.run)
        self._stragglers: Stragglers[str] = Stragglers(
            homeserver,
            "release_one",
            "Could not release the sticky event",
            lambda event_id: self._release_these([event_id]),
            _BACKOFF,
            _MAX_STRAGGLERS,
        )
        self._is_loaded = False
        # Out of the queue and charged, but still in the table.
        self._taken: list[str] = []
        self._expired: list[str] = []  # likewise, as they have expired
        # Deferred events that may not be sticky any more.
        self._dirty: set[str] = set()
        # Rooms whose deferred events may be gone: up to which event ID that was found out.
        self._purged: dict[str, str] = {}
        self._purged_again: set[str] = set()  # those that were purged once more meanwhile
        self._refusals = self._no_insert_before_ms = 0

    def install(self) -> None:
        """Takes effect once the deferred events are loaded. In mode ``off`` none is added."""
        if self._config.mode is not Mode.OFF:
            timed = self._homeserver.metrics.timed_call
            self._writer.defer_by(timed("deferral", "persist", self.defer_txn))
        self._stream.on_event_changed(self._event_changed)
        self._stream.on_room_purged(self._room_purged)
        self._stream.on_user_redacted(self._room_purged)

    async def load(self) -> None:
        """Takes up the deferred events of an earlier run.

        Raises:
            NewerLayoutError: a later version of the module made the table.
        """
        await migrate(self._homeserver, self._table)
        held = self._orders.held_servers
        await self._read_all()
        self._is_loaded = True
        self._ordered.begin(held)
        if count := len(self._waiting):
            logger.info("%d sticky events of an earlier run are still deferred", count)
        self._schedule()

    async def _read_all(self) -> None:
        after = ""
        while page := await self._table.page(after):
            # A room may have been deleted while this process did not run.
            existing = await self._writer.existing([event.event_id for event, _ in page])
            for event, server in page:
                is_out = event.event_id in self._stragglers or event.event_id in self._taken
                is_held = server in self._orders.held_servers
                if is_out or is_held or not self._writer.handles(event.room_id):
                    continue
                if event.event_id in existing:
                    self._waiting.add(event, server)
                else:
                    self._dirty.add(event.event_id)
            after = page[-1][0].event_id

    async def _fill(self) -> None:
        """What waits was forgotten, or is not held any more, and the table has it."""
        if self._is_loaded:
            await self._read_all()
            self._schedule()

    # Deferring, in database threads

    def defer_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        """Adds to the table those of the new events that are past a limit, and gives their IDs.

        None of them if the database does not take the rows, as when somebody took away the right
        to write them, or has locked the table. What fails a transaction without this module fails
        this one, too.
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
        txn.call_after(self._committed, events, deferred)
        return {new.event.event_id for new in deferred}

    def _committed(self, events: Sequence[NewStickyEvent], deferred: Sequence[PastLimit]) -> None:
        # What is raised here would reach whoever persists the events.
        try:
            self._waiting.committed(events, deferred)
            if deferred:
                self._schedule()
        except Exception:
            logger.exception("Could not note %d deferred sticky events", len(deferred))

    def _insert_txn(self, txn: Cursor, deferred: Sequence[PastLimit]) -> bool:
        """Gives whether the database took the rows. Does not ask again for a while if not."""
        now_ms = self._homeserver.steady_ms()
        if now_ms < self._no_insert_before_ms:
            return False
        rows = [(new.event, new.server, new.limit) for new in deferred]
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
        # After a run, or the delay that follows a failure, comes the next one by itself.
        if not self._releasing.is_running and not self._releasing.is_failing:
            self._ring()

    def _ring(self) -> None:
        if not self._is_loaded or not self._waiting.is_whole:
            return
        now_ms = self._homeserver.now_ms()
        is_due = self._dirty or self._purged or self._taken or self._expired
        due_ms = now_ms if is_due else self._waiting.next_due_ms()
        if due_ms is not None:
            self._alarm.ring_at(max(due_ms, now_ms + PAUSE_MS))

    async def _release(self) -> None:
        if not self._waiting.is_whole:
            return
        # A step of each: whoever makes events expire, change or go keeps no other from its release.
        await self._drop_expired()
        await self._drop_redacted()
        await self._drop_purged()
        await self._release_some()
        self._ring()

    async def _release_some(self) -> None:
        if not self._taken:
            self._taken = self._waiting.take(RELEASE_BATCH)
        await self._release_apart(self._taken)
        self._taken = []

    async def _release_these(self, event_ids: Sequence[str]) -> None:
        still_sticky = await self._writer.still_sticky(event_ids)
        found = await self._table.release(event_ids, still_sticky, self._writer.enter_txn)
        self._report.released(found.limits)
        self._report.expired(event_ids, found.expired)
        # Not once more, if the database fails at the others of its batch.
        done = set(event_ids)
        self._taken = [event_id for event_id in self._taken if event_id not in done]
        self._writer.wake(found.room_ids)

    async def _release_apart(self, event_ids: Sequence[str]) -> None:
        self._stragglers.add(await apart(event_ids, self._release_these))

    async def _drop_expired(self) -> None:
        if not self._expired:
            self._expired = self._waiting.expire(EXPIRE_BATCH)
        # Releasing one that has expired drops it, too.
        self._stragglers.add(await apart(self._expired, self._expire))
        self._expired = []

    async def _expire(self, event_ids: Sequence[str]) -> None:
        limits = await self._table.drop(event_ids)
        self._report.expired(event_ids, limits)

    def _event_changed(self, event_id: str) -> None:
        if event_id in self._waiting:
            self._dirty.add(event_id)
            self._schedule()

    def _room_purged(self, room_id: str, user_id: str = "") -> None:
        # Dead events would take the turns of those that live. No local user's event is deferred.
        if room_id and len(self._waiting) and self._writer.handles(room_id):
            # If it is being looked at, the rest of it is, and what was looked at is once more.
            self._purged_again |= {room_id} & self._purged.keys()
            self._purged.setdefault(room_id, "")
            self._schedule()

    async def _drop_purged(self) -> None:
        if not self._purged:
            return
        room_id, after = next(iter(self._purged.items()))
        page = await self._table.of_room(room_id, after, EXPIRE_BATCH)
        await apart(page, self._drop_gone)
        # The other rooms have their turn first.
        del self._purged[room_id]
        if page:
            self._purged[room_id] = page[-1]
        elif room_id in self._purged_again:
            self._purged_again.remove(room_id)
            self._purged[room_id] = ""

    async def _drop_redacted(self) -> None:
        dirty = list(self._dirty)[:RELEASE_BATCH]
        if not dirty:
            return
        # One that cannot be looked at is looked at when it is its turn.
        await apart(dirty, self._drop_gone)
        self._dirty.difference_update(dirty)

    async def _drop_gone(self, event_ids: Sequence[str]) -> None:
        still_sticky = await self._writer.still_sticky(event_ids)
        gone = [event_id for event_id in event_ids if event_id not in still_sticky]
        if gone:
            await self._table.drop(gone)
        self._waiting.remove(gone)
