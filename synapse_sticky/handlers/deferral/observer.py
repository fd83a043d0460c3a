"""What would be deferred and refused, counted and reported, while no limit is applied (H6).

An event that would be deferred waits in memory alone, under the same limits and in the same order
as if it were. There is no row of it, and it is in the stream from the start. What a full server
(``max_deferred_per_server``) sends counts as refused, once an event: a refused server would send it
again until there is room.

A failure leaves the counts incomplete, and nothing else.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.config import FederationConfig
from synapse_sticky.handlers.deferral.handler import (
    EXPIRE_BATCH,
    PAUSE_MS,
    RELEASE_BATCH,
    NewStickyEvent,
    Writer,
)
from synapse_sticky.handlers.deferral.waiting import Bounds, PastLimit, Waiting
from synapse_sticky.homeserver import Cursor, Homeserver
from synapse_sticky.index import Stream
from synapse_sticky.limits import LimitReport
from synapse_sticky.logs import bounded

logger = bounded(__name__)

MAX_FOLLOWED = 100_000
"""How many events wait in memory at most; about 50 MB."""

_BACKOFF = Backoff(10_000, 60_000, spread=0)


class Observer:
    """Follows the events of the rooms whose events this process persists.

    Args:
        config: the limits. They count whatever the mode.
        report: says what would be done.
        on_released: is called with the IDs of events that would be released now, in order.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        writer: Writer,
        stream: Stream,
        config: FederationConfig,
        report: LimitReport,
        *,
        on_released: Callable[[Sequence[str]], object] = lambda event_ids: None,
    ) -> None:
        self._homeserver = homeserver
        self._writer = writer
        self._on_released = on_released
        self._stream = stream
        self._report = report
        bounds = Bounds(config.max_deferred_per_server, MAX_FOLLOWED)
        self._waiting = Waiting(homeserver, config, report, bounds)
        self._going_on = Retrying(
            homeserver, "observe", "Could not observe sticky events", self._go_on, _BACKOFF
        )
        self._alarm = Alarm(homeserver, "observe", self._going_on.run)
        # Events that may not be sticky any more.
        self._dirty: set[str] = set()
        self._failures: set[type[Exception]] = set()

    def install(self) -> None:
        """Takes effect from the next event on."""
        self._writer.defer_by(self.observe_txn)
        self._stream.on_event_changed(self._event_changed)

    def observe_txn(self, txn: Cursor, events: Sequence[NewStickyEvent]) -> Collection[str]:
        """Decides on the new events as if they could be deferred, and defers none.

        Uses nothing of the transaction but the call after it, and never raises.
        """
        with self._guarded():
            past = self._waiting.decide(events)
            txn.call_after(self._committed, events, past)
        return ()

    def _committed(self, events: Sequence[NewStickyEvent], past: Sequence[PastLimit]) -> None:
        # What is raised here would reach whoever persists the events.
        with self._guarded():
            self._waiting.committed(events, past)
            self._schedule()

    def _event_changed(self, event_id: str) -> None:
        if event_id in self._waiting:
            self._dirty.add(event_id)
            self._schedule()

    def _schedule(self) -> None:
        if not self._going_on.is_running and not self._going_on.is_failing:
            self._ring()

    def _ring(self) -> None:
        now_ms = self._homeserver.now_ms()
        due_ms = now_ms if self._dirty else self._waiting.next_due_ms()
        if due_ms is not None:
            self._alarm.ring_at(max(due_ms, now_ms + PAUSE_MS))

    async def _go_on(self) -> None:
        """Does what is due, but no more than a batch of each kind. The reactor has other work."""
        await self._drop_some()
        if expired := self._waiting.expire(EXPIRE_BATCH):
            self._report.expired(expired, self._waiting.limits_of(expired))
        # What is to be dropped is not to be released.
        if not self._dirty and len(expired) < EXPIRE_BATCH:
            taken = self._waiting.take(RELEASE_BATCH)
            self._report.released(self._waiting.limits_of(taken))
            self._on_released(taken)
        self._ring()

    async def _drop_some(self) -> None:
        dirty = list(self._dirty)[:RELEASE_BATCH]
        if not dirty:
            return
        still_sticky = await self._writer.still_sticky(dirty)
        self._waiting.remove([event_id for event_id in dirty if event_id not in still_sticky])
        self._dirty.difference_update(dirty)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Logs what is raised within, the first of each type, and ends it there."""
        try:
            yield
        except Exception as e:
            if type(e) not in self._failures:
                self._failures.add(type(e))
                logger.exception("Could not observe sticky events; the next such errors are hidden")
