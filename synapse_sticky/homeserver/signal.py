"""Waiting for something without asking for it again and again."""

from typing import TYPE_CHECKING

from synapse.logging.context import PreserveLoggingContext
from synapse.util.async_helpers import timeout_deferred
from twisted.internet import defer

from synapse_sticky.homeserver.seams import method

if TYPE_CHECKING:
    from synapse.util.clock import Clock

SEAMS = (method("synapse.util.async_helpers", "timeout_deferred(*, deferred, timeout, clock)"),)


class Signal:
    """Something that any number may wait for, again and again."""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock
        self._waiting: set[defer.Deferred[None]] = set()

    def fire(self) -> None:
        """Wakes all who wait."""
        waiting, self._waiting = self._waiting, set()
        with PreserveLoggingContext():
            for deferred in waiting:
                deferred.callback(None)

    async def wait(self, at_most_ms: int) -> None:
        """Waits until it fires next, or until that long has passed."""
        deferred: defer.Deferred[None] = defer.Deferred(self._waiting.discard)
        self._waiting.add(deferred)
        with PreserveLoggingContext():
            try:
                await timeout_deferred(
                    deferred=deferred, timeout=at_most_ms / 1000, clock=self._clock
                )
            except defer.TimeoutError:
                pass  # as was said
