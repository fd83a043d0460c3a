"""A homeserver whose clock tests set."""

from collections.abc import Callable

from synapse_sticky.metrics import Metrics

METRICS = Metrics("here")


class Settable:
    """``set_by_ms``: how far the wall clock is from the time that passes when a test says."""

    metrics = METRICS
    set_by_ms = 0
    _listeners: tuple[Callable[[int], None], ...] = ()

    def on_clock_set(self, listener: Callable[[int], None]) -> None:
        self._listeners += (listener,)

    def set_clock(self, by_ms: int) -> None:
        """Sets it by so much, forward or back; no time passes."""
        self.set_by_ms += by_ms
        for listener in self._listeners:
            listener(by_ms)
