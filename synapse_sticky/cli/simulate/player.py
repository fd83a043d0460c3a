"""Plays arrivals against limits, in no time.

It decides nothing itself. ``Observer`` does, as it does on a homeserver in mode ``observe``: by the
same limits, in the same order and at the same times as events are deferred and released. Only the
clock is another one.
"""

import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from synapse_sticky.cli.simulate.arrivals import Arrival, UnusableError
from synapse_sticky.cli.simulate.outcome import Fate, Outcome
from synapse_sticky.config import FederationConfig, Mode
from synapse_sticky.handlers.deferral.observer import Observer
from synapse_sticky.limits import LimitReport
from synapse_sticky.metrics import Metrics

_GRACE_MS = 60_000


def play(
    arrivals: Sequence[Arrival],
    config: FederationConfig,
    server_name: str,
    on_played: Callable[[], object] = lambda: None,
) -> Outcome:
    """What would become of these events at this server.

    Args:
        arrivals: by the time of their arrival.
        on_played: is called once an event has arrived.

    Raises:
        UnusableError: what this configuration does cannot be played.
    """
    if config.mode is Mode.REJECT:
        raise UnusableError(
            "`federation: {mode: reject}` cannot be simulated: what arrives then depends on when"
            " the other servers try again. Simulate `defer` with the same limits."
        )
    homeserver: Any = _Homeserver(server_name, arrivals[0].at_ms)
    outcome = Outcome(arrivals)
    clerk = _Clerk(homeserver, outcome)
    Observer(
        homeserver, homeserver, homeserver, config, clerk, on_released=clerk.note_released
    ).install()
    for one in arrivals:
        homeserver.run_until(one.at_ms)
        clerk.arrived(one)
        on_played()
    # Whatever happens, nothing waits for longer.
    homeserver.run_until(max(one.event.expires_at_ms for one in arrivals) + _GRACE_MS)
    return outcome


class _Clerk(LimitReport):
    """Notes what is said of each event, instead of logging it."""

    def __init__(self, homeserver: "_Homeserver", outcome: Outcome) -> None:
        super().__init__(homeserver.now_ms, homeserver.metrics.observed)
        self._homeserver = homeserver
        self._outcome = outcome
        # Of the event that is arriving.
        self._fate = Fate.NOW
        self._limit = ""

    def arrived(self, one: Arrival) -> None:
        """Takes it in, as Synapse would."""
        self._fate, self._limit = Fate.NOW, ""
        self._homeserver.persist(one)
        self._outcome.arrived(one, self._fate, self._limit)

    def note_released(self, event_ids: Sequence[str]) -> None:
        """These events are delivered now."""
        for event_id in event_ids:
            self._outcome.released(event_id, self._homeserver.now_ms())

    def refused(
        self, limit: str, who: str, where: str, retry_after_ms: int | None, count: int
    ) -> None:
        self._fate, self._limit = Fate.REFUSED, limit

    def deferred(
        self, limit: str, server: str, room_id: str, server_count: int, delay_ms: int, sender: str
    ) -> None:
        self._fate, self._limit = Fate.LATER, limit

    def released(self, limits: Iterable[str | None]) -> None:
        """Counted nowhere."""

    def expired(self, event_ids: Sequence[str], limits: Sequence[str | None]) -> None:
        for event_id in event_ids:
            self._outcome.expired(event_id)


class _Homeserver:
    """What an observer needs of a homeserver: its name, a clock, timers, and new events."""

    def __init__(self, server_name: str, now_ms: int) -> None:
        self.server_name = server_name
        self.metrics = Metrics(server_name)
        self._now_ms = now_ms
        self._timers: list[tuple[int, int, _Timer]] = []
        self._numbers = itertools.count()
        self._defer_txn: Callable[[Any, Any], Collection[str]] = lambda txn, events: ()

    def now_ms(self) -> int:
        return self._now_ms

    steady_ms = now_ms

    def defer_by(self, defer_txn: Callable[[Any, Any], Collection[str]]) -> None:
        self._defer_txn = defer_txn

    def on_event_changed(self, listener: object) -> None:
        """No event is redacted."""

    def persist(self, one: Arrival) -> None:
        txn = _Transaction()
        self._defer_txn(txn, [one.event])
        for callback, args in txn.after:
            callback(*args)

    def in_reactor(self, function: Callable[..., object], *args: Any) -> None:
        function(*args)

    def in_background(self, what: str, function: Callable[..., Any], *args: Any) -> None:
        _run(function(*args))

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Any], *args: Any
    ) -> "_Timer":
        timer = _Timer(lambda: _run(function(*args)))
        due_ms = self._now_ms + max(delay_ms, 0)
        heapq.heappush(self._timers, (due_ms, next(self._numbers), timer))
        return timer

    def run_until(self, at_ms: int) -> None:
        """Has this time come, and calls what is due until then."""
        while self._timers and self._timers[0][0] <= at_ms:
            due_ms, _, timer = heapq.heappop(self._timers)
            if timer.active():
                self._now_ms = max(self._now_ms, due_ms)
                timer.call()
        self._now_ms = max(self._now_ms, at_ms)


class _Timer:
    def __init__(self, function: Callable[[], object]) -> None:
        self._function: Callable[[], object] | None = function

    def active(self) -> bool:
        return self._function is not None

    def cancel(self) -> None:
        self._function = None

    def call(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


class _Transaction:
    def __init__(self) -> None:
        self.after: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def call_after(self, callback: Callable[..., object], *args: Any) -> None:
        self.after.append((callback, args))


def _run(coroutine: Any) -> None:
    """Runs it to its end. Nothing here has it wait."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise RuntimeError("it waits for something")
