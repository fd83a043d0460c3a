"""When a destination is asked: one question at a time, and few a second (H4).

Synapse by default answers ten requests a second of one server at once, lets the others wait and
refuses those past fifty. This server asks for other things, too. Destinations that are due wait in
line for one of a few places (``places``).
"""

from collections.abc import Awaitable, Callable

import attr

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.confirmation.places import Places
from synapse_sticky.handlers.joins.due import DueTimes
from synapse_sticky.handlers.joins.federation import LONGEST_BACKOFF_MS
from synapse_sticky.homeserver import Cancellable, Homeserver

APART_MS = 250
"""The time between the questions to a destination, at least."""

OVERDUE_MS = 30_000
"""How long a destination waits in line for a place. After that it is believed, and not asked."""

_AFTER_ERROR_MS = 60_000

_UNREACHABLE = Backoff(1_000, 60_000)


@attr.s(auto_attribs=True, slots=True)
class _Destination:
    """Which rooms a destination is to be asked for, and when each is (ms of the steady time).

    due: by room ID.
    is_busy: whether the destination waits in line or is being asked.
    timer: rings when the next room is due, or when the destination has waited in line for long.
    """

    due: DueTimes = attr.Factory(DueTimes)
    not_before_ms: int = 0
    failures: int = 0
    is_busy: bool = False
    timer: Cancellable | None = None
    timer_ms: int = 0

    def next_ms(self) -> int:
        """When the destination is to be asked next."""
        first = self.due.first()
        return max(first[0] if first else 0, self.not_before_ms)


class Questions:
    """The questions to all destinations of this process."""

    def __init__(
        self,
        homeserver: Homeserver,
        ask: Callable[[str, str], Awaitable[int | None]],
        *,
        is_believed: Callable[[str], bool],
        on_overdue: Callable[[str], None],
    ) -> None:
        """
        Args:
            ask: asks a destination for a room; gives after how many ms it is to be asked for the
                room again, None if not.
            is_believed: whether the destination's acknowledgements suffice. Then ``ask`` asks it
                nothing, and needs no place.
            on_overdue: the destination has waited in line for long. From now on it is believed.
        """
        self._homeserver = homeserver
        self._ask = ask
        self._is_believed = is_believed
        self._on_overdue = on_overdue
        self._destinations: dict[str, _Destination] = {}
        self._places = Places()
        self._is_filling = False

    def add(self, destination: str, room_id: str, delay_ms: int) -> None:
        """Asks for the room after the delay; does nothing if the room already has its time."""
        state = self._destinations.setdefault(destination, _Destination())
        if room_id not in state.due:
            state.due.set(room_id, self._homeserver.steady_ms() + delay_ms)
            self._arm(destination, state)

    def rooms(self, destination: str) -> list[str]:
        """The rooms that it is to be asked for."""
        state = self._destinations.get(destination)
        return state.due.keys() if state else []

    def put_off(self, destination: str, until_ms: int = 0) -> None:
        """The destination cannot be reached: all questions wait, longer each time.

        Args:
            until_ms: at least until then (ms since the epoch).
        """
        if (state := self._destinations.get(destination)) is not None:
            state.failures += 1
            delay_ms = _UNREACHABLE.after(state.failures)
            delay_ms = max(delay_ms, min(until_ms - self._homeserver.now_ms(), LONGEST_BACKOFF_MS))
            state.not_before_ms = self._homeserver.steady_ms() + delay_ms

    def reached(self, destination: str) -> None:
        """The destination has answered."""
        if (state := self._destinations.get(destination)) is not None:
            state.failures = 0

    def _arm(self, destination: str, state: _Destination) -> None:
        if state.is_busy:
            return  # it is done after the answer
        due_ms = state.next_ms()
        if state.timer is not None and state.timer.active():
            if state.timer_ms <= due_ms:
                return
            state.timer.cancel()
        state.timer_ms = due_ms
        delay_ms = max(due_ms - self._homeserver.steady_ms(), 0) + 1
        state.timer = self._homeserver.call_later(delay_ms, "ask", self._due, destination)

    async def _due(self, destination: str) -> None:
        state = self._destinations[destination]
        state.timer = None
        if state.next_ms() > self._homeserver.steady_ms():
            self._arm(destination, state)
            return
        state.is_busy = True
        if self._is_believed(destination):
            await self._ask_for_first(destination)
            return
        self._places.wait(destination)
        state.timer = self._homeserver.call_later(OVERDUE_MS, "ask", self._overdue, destination)
        self._fill_places()

    async def _overdue(self, destination: str) -> None:
        self._places.stop_waiting(destination)
        self._on_overdue(destination)
        await self._ask_for_first(destination)

    def _fill_places(self) -> None:
        if self._is_filling:
            return  # the loop that runs goes on: the question that it began may have ended at once
        self._is_filling = True
        try:
            while (destination := self._places.take(self._homeserver.steady_ms())) is not None:
                if (timer := self._destinations[destination].timer) is not None:
                    timer.cancel()
                self._homeserver.in_background("ask", self._ask_in_place, destination)
        finally:
            self._is_filling = False

    async def _ask_in_place(self, destination: str) -> None:
        try:
            await self._ask_for_first(destination)
        finally:
            self._places.leave(destination, self._homeserver.steady_ms())
            self._fill_places()

    async def _ask_for_first(self, destination: str) -> None:
        state = self._destinations[destination]
        room_id = state.due.take_first()
        delay_ms: int | None = _AFTER_ERROR_MS
        try:
            delay_ms = await self._ask(destination, room_id)
        finally:
            now_ms = self._homeserver.steady_ms()
            state.is_busy, state.timer = False, None
            if delay_ms is not None and room_id not in state.due:
                state.due.set(room_id, now_ms + delay_ms)
            state.not_before_ms = max(state.not_before_ms, now_ms + APART_MS)
            if state.due:
                self._arm(destination, state)
            else:
                del self._destinations[destination]
