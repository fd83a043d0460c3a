"""The pushes of each destination, and the one timer that a destination's pushes share."""

from collections.abc import Awaitable, Callable, Collection

import attr

from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.homeserver import Cancellable, Homeserver

_CHECK_MIN_MS = 1_000
_CHECK_MAX_MS = 60_000


@attr.s(auto_attribs=True, slots=True)
class Destination:
    """What one destination is pushed.

    pushes: by room ID; the rooms take turns in this order.
    check_interval_ms: how long after a check the next one is due. It doubles with each check, and
        is reset by progress.
    next_check_ms: when the next check of a push that has nothing to send is due.
    """

    pushes: dict[str, Push] = attr.Factory(dict)
    timer: Cancellable | None = None
    check_interval_ms: int = _CHECK_MIN_MS
    next_check_ms: int = 0

    def progressed(self) -> None:
        """There may be something to do now: the next check is due soon."""
        self.check_interval_ms = _CHECK_MIN_MS
        self.next_check_ms = 0

    def cancel_timer(self) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()


class Destinations:
    """All pushes of this process."""

    def __init__(
        self,
        homeserver: Homeserver,
        *,
        check: Callable[[str], Awaitable[int]],
        wake: Callable[[str], Awaitable[None]],
    ) -> None:
        """
        Args:
            check: ends what has expired; gives when the destination's back-off ends (ms since the
                epoch).
            wake: has Synapse ask for a batch of the destination, unless it is backed off.
        """
        self._homeserver = homeserver
        self._check = check
        self._wake = wake
        self._destinations: dict[str, Destination] = {}

    def get(self, destination: str) -> Destination | None:
        """The pushes of the destination, None if there is none."""
        return self._destinations.get(destination)

    def names(self) -> list[str]:
        """All destinations that something is pushed to, or watched for."""
        return list(self._destinations)

    def pushes_of(self, destination: str) -> list[Push]:
        """The pushes of the destination, in the order of their turns."""
        state = self._destinations.get(destination)
        return list(state.pushes.values()) if state else []

    def of_rooms(self, destination: str, rooms: Collection[str]) -> list[Push]:
        """The pushes of these rooms to the destination."""
        return [push for push in self.pushes_of(destination) if push.room_id in rooms]

    def find(self, destination: str, room_id: str) -> Push | None:
        """The push of the room to the destination, None if there is none."""
        state = self._destinations.get(destination)
        return state.pushes.get(room_id) if state else None

    def add(self, push: Push) -> None:
        """Adds the push, in the place of another one to the same room."""
        state = self._destinations.setdefault(push.destination, Destination())
        state.pushes[push.room_id] = push
        state.progressed()

    def remove(self, push: Push) -> None:
        """Removes the push, which must be there."""
        state = self._destinations[push.destination]
        del state.pushes[push.room_id]
        if not state.pushes:
            del self._destinations[push.destination]
            state.cancel_timer()

    def is_current(self, push: Push) -> bool:
        """Is the push still there, and not another one to the same room?"""
        return self.find(push.destination, push.room_id) is push

    def schedule(self, destination: str) -> None:
        """Sets the destination's timer. It fires when an event is due, when the watch of a settled
        push ends, or when a push that is not settled is to be checked again."""
        state = self._destinations.get(destination)
        if state is None:
            return
        now_ms = self._homeserver.now_ms()
        times = [p.next_due_ms(now_ms) for p in state.pushes.values()]
        times += [
            max(p.watch_until_ms if p.is_settled else 0, state.next_check_ms)
            for p in state.pushes.values()
            if not p.is_open
        ]
        due_ms = min((t for t in times if t is not None), default=now_ms + _CHECK_MAX_MS)
        self._set_timer(max(due_ms - now_ms, 0) + 1, destination, state)

    def _set_timer(self, delay_ms: int, destination: str, state: Destination) -> None:
        state.cancel_timer()
        state.timer = self._homeserver.call_later(
            delay_ms, "check_destination", self._check_now, destination
        )

    async def _check_now(self, destination: str) -> None:
        state = self._destinations.get(destination)
        if state is None:
            return
        # Synapse may ask for no batch now, as it is sending or backed off: another check follows.
        delay_ms = state.check_interval_ms
        try:
            retry_at_ms = await self._check(destination)
            delay_ms = max(delay_ms, retry_at_ms - self._homeserver.now_ms())
        finally:
            if self._destinations.get(destination) is state:
                state.check_interval_ms = min(state.check_interval_ms * 2, _CHECK_MAX_MS)
                state.next_check_ms = self._homeserver.now_ms() + delay_ms
                self._set_timer(delay_ms, destination, state)
        if destination in self._destinations:
            await self._wake(destination)
