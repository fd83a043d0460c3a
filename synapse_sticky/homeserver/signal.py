"""Waiting for something without asking for it again and again."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from synapse.logging.context import PreserveLoggingContext
from twisted.internet.defer import Deferred


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...
    def active(self) -> bool: ...


class CallLater(Protocol):
    """Calls after a delay in ms, wherever the clock is set to meanwhile (H2)."""

    def __call__(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], /, *args: object
    ) -> Timer: ...


class Signal:
    """Something that any number may wait for, again and again."""

    def __init__(self, call_later: CallLater) -> None:
        self._call_later = call_later
        self._waiting: set[Deferred[None]] = set()

    def fire(self) -> None:
        """Wakes all who wait."""
        waiting, self._waiting = self._waiting, set()
        with PreserveLoggingContext():
            for deferred in waiting:
                deferred.callback(None)

    async def wait(self, at_most_ms: int) -> None:
        """Waits until it fires next, or until that long has passed."""
        deferred: Deferred[None] = Deferred(self._waiting.discard)
        self._waiting.add(deferred)
        timer = self._call_later(at_most_ms, "wait", self._give_up, deferred)
        try:
            with PreserveLoggingContext():
                await deferred
        finally:
            if timer.active():
                timer.cancel()

    async def _give_up(self, deferred: Deferred[None]) -> None:
        if deferred in self._waiting:
            self._waiting.remove(deferred)
            with PreserveLoggingContext():
                deferred.callback(None)
