"""When a destination is asked: one question at a time, and few a second (H4).

Synapse by default answers ten requests a second of one server at once, lets the others wait and
refuses those past fifty. This server asks for other things, too.
"""

from collections.abc import Awaitable, Callable

import attr

from synapse_sticky.backoff import Backoff
from synapse_sticky.homeserver import Cancellable, Homeserver

APART_MS = 250
"""The time between the questions to a destination, at least."""

MOST_AT_ONCE = 20
"""How many questions of this process may be under way, to all destinations."""

_AFTER_ERROR_MS = 60_000

_UNREACHABLE = Backoff(1_000, 60_000)


@attr.s(auto_attribs=True, slots=True)
class _Line:
    """Which rooms a destination is to be asked for, and when each is (ms since the epoch)."""

    due_ms: dict[str, int] = attr.Factory(dict)
    not_before_ms: int = 0
    failures: int = 0
    is_asking: bool = False
    timer: Cancellable | None = None
    timer_ms: int = 0


class Questions:
    """The questions to all destinations of this process."""

    def __init__(
        self, homeserver: Homeserver, ask: Callable[[str, str], Awaitable[int | None]]
    ) -> None:
        """
        Args:
            ask: asks a destination for a room; gives after how many ms it is to be asked for the
                room again, None if not.
        """
        self._homeserver = homeserver
        self._ask = ask
        self._lines: dict[str, _Line] = {}
        self._under_way = 0

    def add(self, destination: str, room_id: str, delay_ms: int) -> None:
        """Asks for the room after the delay; does nothing if that is due at any time."""
        line = self._lines.setdefault(destination, _Line())
        if room_id not in line.due_ms:
            line.due_ms[room_id] = self._homeserver.now_ms() + delay_ms
            self._arm(destination, line)

    def rooms(self, destination: str) -> list[str]:
        """The rooms that it is to be asked for."""
        line = self._lines.get(destination)
        return list(line.due_ms) if line else []

    def put_off(self, destination: str, until_ms: int = 0) -> None:
        """The destination cannot be reached: all questions wait, longer each time.

        Args:
            until_ms: at least until then (ms since the epoch).
        """
        if (line := self._lines.get(destination)) is not None:
            line.failures += 1
            delay_ms = _UNREACHABLE.after(line.failures)
            line.not_before_ms = max(self._homeserver.now_ms() + delay_ms, until_ms)

    def reached(self, destination: str) -> None:
        """The destination has answered."""
        if (line := self._lines.get(destination)) is not None:
            line.failures = 0

    def _arm(self, destination: str, line: _Line) -> None:
        if line.is_asking:
            return  # it is done after the answer
        due_ms = max(min(line.due_ms.values()), line.not_before_ms)
        if line.timer is not None and line.timer.active():
            if line.timer_ms <= due_ms:
                return
            line.timer.cancel()
        line.timer_ms = due_ms
        delay_ms = max(due_ms - self._homeserver.now_ms(), 0) + 1
        line.timer = self._homeserver.call_later(delay_ms, "ask", self._next, destination)

    async def _next(self, destination: str) -> None:
        line = self._lines[destination]
        now_ms = self._homeserver.now_ms()
        line.timer = None
        room_id = min(line.due_ms, key=lambda room_id: line.due_ms[room_id])
        if max(line.due_ms[room_id], line.not_before_ms) > now_ms:
            self._arm(destination, line)
            return
        line.not_before_ms = now_ms + APART_MS
        if self._under_way >= MOST_AT_ONCE:
            self._arm(destination, line)
            return
        del line.due_ms[room_id]
        line.is_asking = True
        self._under_way += 1
        delay_ms: int | None = _AFTER_ERROR_MS
        try:
            delay_ms = await self._ask(destination, room_id)
        finally:
            self._under_way -= 1
            line.is_asking = False
            if delay_ms is not None:
                line.due_ms.setdefault(room_id, self._homeserver.now_ms() + delay_ms)
            line.not_before_ms = max(line.not_before_ms, self._homeserver.now_ms() + APART_MS)
            if line.due_ms:
                self._arm(destination, line)
            else:
                del self._lines[destination]
