"""The events that wait, in memory, and which new ones join them (L1, L4, L5, L7, D7).

Decides the same whether events are really deferred or only observed.
"""

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

import attr

from synapse_sticky._core import Limiter, ReleaseQueue
from synapse_sticky.config import FederationConfig
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.limits import LimitReport, federation_limiter, per_second
from synapse_sticky.metrics import NOT_RECORDED
from synapse_sticky.orders import HELD, Orders
from synapse_sticky.renewal import OnPanic, Renewed

if TYPE_CHECKING:
    from synapse_sticky.handlers.deferral.handler import NewStickyEvent

_MAX_DECISIONS = 10_000
_MAX_LIMITS = 100_000
"""Of how many observed events it is remembered which limit would defer them; about 20 MB."""
_REFUSED = "max_deferred_per_server"


@attr.s(auto_attribs=True, frozen=True, slots=True)
class PastLimit:
    """An event that is past a limit.

    server: the sender's.
    limit: the name of the option.
    """

    event: "NewStickyEvent"
    server: str
    limit: str


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Bounds:
    """How many events may wait.

    per_server: of one server. Further events of it count as refused, within a limit or not, as
        the whole transaction would have been.
    total: of all servers. Further events count as deferred, and what becomes of them is not
        followed.
    """

    per_server: int
    total: int


@attr.s(auto_attribs=True, frozen=True, slots=True)
class _Core:
    """They belong together: a call of the queue charges the limiter."""

    queue: ReleaseQueue
    limiter: Limiter


def _new_core(config: FederationConfig, on_panic: OnPanic) -> _Core:
    return _Core(ReleaseQueue(on_panic=on_panic), federation_limiter(config, on_panic))


class Waiting:
    """The events of other servers that wait for their release, and the limits that hold them up.

    ``decide`` is for database threads. All else is for the reactor's thread. While what has
    panicked is made anew, nothing is past a limit.

    Args:
        bounds: None if transactions are refused before too many events wait.
        fill: adds all events that wait, once what has panicked is made anew; None if they are
            forgotten then.
        on_whole: is called after that.
        orders: of administrators; none, if these do not count.
    """

    def __init__(
        self,
        homeserver: Homeserver,
        config: FederationConfig,
        report: LimitReport,
        bounds: Bounds | None = None,
        fill: Callable[[], Awaitable[None]] | None = None,
        on_whole: Callable[[], None] = lambda: None,
        orders: Orders | None = None,
    ) -> None:
        self._homeserver = homeserver
        self._config = config
        self._orders = orders or Orders()
        self._report = report
        self._bounds = bounds
        self._fill = fill
        self._exempts, self._exempts_user = config.exempts(), config.exempts_user()
        self._core = Renewed(
            homeserver,
            "deferral",
            partial(_new_core, config),
            self._refill,
            problem="Could not read the deferred events",
            on_whole=on_whole,
        )
        # Synapse persists events in database threads.
        self._lock = threading.Lock()
        # Decisions of transactions that are not through, by event ID: they may be tried again.
        self._decisions: OrderedDict[str, str | None] = OrderedDict()
        # By event ID, for the metrics: the limit that would defer it. Of deferred events the table
        # has it.
        self._limits: OrderedDict[str, str] = OrderedDict()
        name = "observed_waiting" if report.observes else "deferred_waiting"
        homeserver.metrics.show(name, self, len)

    async def _refill(self) -> None:
        if self._fill is not None:
            await self._fill()
        else:
            self._limits.clear()

    @property
    def is_whole(self) -> bool:
        """Are all events here that wait? Not while what has panicked is made anew."""
        return self._core.is_whole

    @property
    def _queue(self) -> ReleaseQueue:
        return self._core.it.queue

    def __len__(self) -> int:
        return len(self._queue)

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._queue

    def decide(self, events: Sequence["NewStickyEvent"]) -> list[PastLimit]:
        """Those of the new events that are past a limit. Charges the others.

        An event is decided on once, however often a transaction with it is tried, until
        ``committed`` is called.
        """
        past = []
        with self._lock:
            for event in events:
                server = event.sender.partition(":")[2]
                if server == self._homeserver.server_name or self._is_exempt_server(server):
                    continue
                if (limit := self._limit_past(event, server)) is not None:
                    past.append(PastLimit(event, server, limit))
        return past

    def _is_exempt_server(self, server: str) -> bool:
        # What is ordered for a time comes before what is configured.
        orders = self._orders
        is_exempt = server in orders.exempt_servers or self._exempts(server)
        return is_exempt and server not in orders.held_servers

    def _is_exempt_user(self, user_id: str) -> bool:
        return user_id in self._orders.exempt_users or self._exempts_user(user_id)

    def _limit_past(self, event: "NewStickyEvent", server: str) -> str | None:
        if event.event_id in self._decisions:
            return self._decisions[event.event_id]
        limit: str | None = None
        if server in self._orders.held_servers:
            limit = HELD
        elif self.is_whole:
            limit = self._admit(event, server)
        self._decisions[event.event_id] = limit
        if len(self._decisions) > _MAX_DECISIONS:
            self._decisions.popitem(last=False)
        return limit

    def _admit(self, event: "NewStickyEvent", server: str) -> str | None:
        if self._is_full(server):
            return _REFUSED
        core, now_ms = self._core.it, self._homeserver.now_ms()
        is_exempt = self._is_exempt_user(event.sender)
        return core.queue.admit(
            core.limiter, event.room_id, server, event.sender, now_ms, is_exempt=is_exempt
        )

    def _is_full(self, server: str) -> bool:
        return self._bounds is not None and self._queue.waiting(server) >= self._bounds.per_server

    def committed(self, events: Sequence["NewStickyEvent"], past: Sequence[PastLimit]) -> None:
        """The transaction with these events is through: those past a limit wait from now on.

        Synapse calls this for each attempt of the transaction. Only the first call has an effect.
        """
        with self._lock:
            final = {e.event_id for e in events if e.event_id in self._decisions}
            for event_id in final:
                del self._decisions[event_id]
        for new in past:
            if new.limit == HELD:
                if new.event.event_id in final:
                    self._report.held()
                # As long as the server is held it is in the table only, and read there afterwards.
                if new.server not in self._orders.held_servers:
                    self.add(new.event, new.server)
            elif new.limit == _REFUSED or self._is_full(new.server):
                if new.event.event_id in final:
                    where = f"in {new.event.room_id}"
                    self._report.refused(_REFUSED, new.server, where, None, 1)
            elif self._bounds is not None and len(self) >= self._bounds.total:
                if new.event.event_id in final:
                    self._deferred(new)
            elif new.server in self._orders.held_servers:
                self._deferred(new)  # held since it was decided on
            elif self.add(new.event, new.server):
                self._deferred(new)

    def limits_of(self, event_ids: Collection[str]) -> list[str]:
        """Which limit would have deferred each of these observed events, that wait no more. Forgets
        that."""
        return [self._limits.pop(event_id, NOT_RECORDED) for event_id in event_ids]

    def _deferred(self, new: PastLimit) -> None:
        if self._report.observes:
            self._limits[new.event.event_id] = new.limit
            while len(self._limits) > _MAX_LIMITS:
                self._limits.popitem(last=False)
        count = self._queue.waiting(new.server)
        delay_ms = round(count * 1000 / per_second(self._config, new.limit))
        room_id, sender = new.event.room_id, new.event.sender
        self._report.deferred(new.limit, new.server, room_id, count, delay_ms, sender)

    def add(self, event: "NewStickyEvent", server: str) -> bool:
        """Has the event wait. Gives False if it does already."""
        with self._lock:
            return self._queue.add(
                event.event_id,
                event.room_id,
                server,
                event.sender,
                event.expires_at_ms,
                key=event.key,
                newness_ms=event.newness_ms,
                is_exempt=self._is_exempt_user(event.sender),
            )

    def take(self, at_most: int) -> list[str]:
        """Takes out the events whose turn it is, and charges them. Gives their IDs, in order."""
        with self._lock:
            core = self._core.it
            return core.queue.take(core.limiter, self._homeserver.now_ms(), at_most)

    def expire(self, at_most: int) -> list[str]:
        """Takes out events that have expired. Gives their IDs."""
        with self._lock:
            return self._queue.expire(self._homeserver.now_ms(), at_most)

    def remove(self, event_ids: Collection[str]) -> None:
        """Takes out these events."""
        with self._lock:
            for event_id in event_ids:
                self._queue.remove(event_id)
                self._limits.pop(event_id, None)

    def next_due_ms(self) -> int | None:
        """When there may be an event to take or to expire, in ms since the epoch; None if no event
        waits."""
        return self._queue.next_due_ms(self._homeserver.now_ms())
