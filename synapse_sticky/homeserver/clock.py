"""Delays that last as long as they should when somebody sets the clock (H2).

Twisted's timers go by the wall clock. Set forward, all of them fire at once; set back by an hour,
none fires for an hour. So this looks at a clock that is never set, too.
"""

import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from typing import Any, Protocol

from synapse_sticky.logs import bounded

logger = bounded(__name__)

_SET_MS = 500
"""The wall clock was set if it is that far from where it should be."""

_LOOK_EVERY_S = 1.0

_EARLY_MS = 20
"""A timer that fires this much too early was not moved by the clock."""

_AT_ONCE = 200
"""How many timers are set anew in one turn of the reactor."""

OnSet = Callable[[int], None]
CallLater = Callable[..., Any]
"""``(delay_ms, function, *args, desc=)``: calls by Twisted's own timer."""
InReactor = Callable[..., None]


class Running(Protocol):
    """A reactor that runs, or will."""

    def callWhenRunning(self, function: Callable[..., Any], *args: Any) -> object: ...  # noqa: N802


class Delayed:
    """A call after a delay, wherever the wall clock is set to meanwhile."""

    def __init__(self, clock: "SetClock", due_ms: int, what: str, call: Callable[[], Any]) -> None:
        self._clock = clock
        self._due_ms = due_ms
        self._what = what
        self._call = call
        self._timer: Any = None
        self.arm()

    def arm(self) -> None:
        """Sets Twisted's timer to what is left of the delay."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        left_ms = max(self._due_ms - self._clock.steady_ms(), 0)
        self._timer = self._clock.call_by_twisted(left_ms, self._fire, desc=self._what)

    def _fire(self) -> Awaitable[None] | None:
        if self._due_ms - self._clock.steady_ms() > _EARLY_MS:
            self.arm()
            return None
        self._clock.pending.discard(self)
        result: Awaitable[None] | None = self._call()
        return result

    def active(self) -> bool:
        """Is it still to come?"""
        return bool(self._timer.active())

    def cancel(self) -> None:
        """It will not come. It must be still to come."""
        self._clock.pending.discard(self)
        self._timer.cancel()


class SetClock:
    """The wall clock that somebody may set, a steady one, and timers by the steady one.

    pending: the timers that have not fired.
    """

    def __init__(
        self,
        wall_ms: Callable[[], int],
        call_by_twisted: CallLater,
        in_reactor: InReactor,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            wall_ms: the time in ms since the epoch.
            call_by_twisted: sets a timer of Twisted's; gives its handle.
            in_reactor: has a function called in the reactor's thread.
            monotonic_s: a time in seconds that nobody sets.
        """
        self._wall_ms = wall_ms
        self.call_by_twisted = call_by_twisted
        self._in_reactor = in_reactor
        self._monotonic_s = monotonic_s
        # So both are the same until somebody sets the clock.
        self._began_ms = wall_ms() - int(monotonic_s() * 1_000)
        self._ahead_ms = 0
        # By how much it was set, for those who listen and have not heard yet.
        self._untold: list[int] = []
        self._lock = threading.Lock()
        self._listeners: list[OnSet] = []
        self.pending: set[Delayed] = set()
        self._closed = threading.Event()

    def steady_ms(self) -> int:
        """A time that goes on evenly: ms since the epoch, as if nobody had set the clock."""
        return self._began_ms + int(self._monotonic_s() * 1_000)

    def now_ms(self) -> int:
        """The time in ms since the epoch. Whoever listens hears first if the clock was set."""
        now_ms = self._wall_ms()
        # What ``steady_ms`` gives: each event comes by here several times.
        by_ms = now_ms - self._began_ms - int(self._monotonic_s() * 1_000) - self._ahead_ms
        if abs(by_ms) > _SET_MS:
            self._was_set()
        if self._untold and threading.current_thread() is threading.main_thread():
            self._tell()
        return now_ms

    def on_set(self, listener: OnSet) -> None:
        """Calls back, in the reactor's thread, with the ms by which the clock was set forward, or
        back if they are negative. Slow corrections are told of once they come to half a second."""
        self._listeners.append(listener)

    def call_later(self, delay_ms: int, what: str, call: Callable[[], Any]) -> Delayed:
        """Calls after the delay; 0 or less is as soon as possible."""
        delayed = Delayed(self, self.steady_ms() + max(delay_ms, 0), what, call)
        self.pending.add(delayed)
        return delayed

    def _was_set(self) -> None:
        with self._lock:
            by_ms = self._wall_ms() - self.steady_ms() - self._ahead_ms
            if abs(by_ms) <= _SET_MS:
                return  # another thread has said so
            # In this order: who takes the new time for the right one finds that it has to be told.
            self._untold.append(by_ms)
            self._ahead_ms += by_ms
        # Those that are late are set anew; those that are early find out when they fire.
        if by_ms < 0:
            self._in_reactor(self._arm_all)
        if threading.current_thread() is not threading.main_thread():
            self._in_reactor(self._tell)

    def _tell(self) -> None:
        while self._untold:
            by_ms = self._untold.pop(0)
            for listener in self._listeners:
                try:
                    listener(by_ms)
                except Exception:
                    # Whoever asked for the time goes on, and so do the other listeners.
                    logger.exception("Could not note that the clock was set by %d ms", by_ms)

    def _arm_all(self) -> None:
        self._arm(iter(list(self.pending)))

    def _arm(self, timers: Iterable[Delayed]) -> None:
        some = list(islice(timers, _AT_ONCE))
        for delayed in some:
            if delayed in self.pending:
                delayed.arm()
        if some:
            self._in_reactor(self._arm, timers)

    # While nothing happens

    def look_when_running(self, reactor: Running) -> None:
        """From when the reactor runs, looks at the clock every second: not by a timer of Twisted's.

        A homeserver may fork before it runs, and a thread from before that would be gone.
        """
        reactor.callWhenRunning(_start, weakref.ref(self), self._closed)

    def close(self) -> None:
        """Looks no more."""
        self._closed.set()


def _start(clock: "weakref.ref[SetClock]", closed: threading.Event) -> None:
    name = "synapse_sticky_clock"
    threading.Thread(target=_look, args=(clock, closed), name=name, daemon=True).start()


def _look(clock: "weakref.ref[SetClock]", closed: threading.Event) -> None:
    while not closed.wait(_LOOK_EVERY_S):
        if (there := clock()) is None:
            return
        there.now_ms()
        del there
