"""A timer that is never put off."""

from collections.abc import Awaitable, Callable

from synapse_sticky.homeserver import Cancellable, Homeserver


class Alarm:
    """Calls a coroutine function at the earliest of the times that it was told since the last call.

    Args:
        what: names the background process.
        function: is called without arguments.
    """

    def __init__(
        self, homeserver: Homeserver, what: str, function: Callable[[], Awaitable[None]]
    ) -> None:
        self._homeserver = homeserver
        self._what = what
        self._function = function
        self._timer: Cancellable | None = None
        self._due_ms = 0

    def ring_at(self, due_ms: int) -> None:
        """Calls at this time, in ms since the epoch, if not earlier."""
        if self._timer is not None and self._timer.active():
            # Never postponed: a flood faster than the pause would postpone it for ever.
            if self._due_ms <= due_ms:
                return
            self._timer.cancel()
        self._due_ms = due_ms
        delay_ms = due_ms - self._homeserver.now_ms()
        self._timer = self._homeserver.call_later(delay_ms, self._what, self._function)
