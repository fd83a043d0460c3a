"""The pushes of each destination, and the one timer that a destination's pushes share."""

from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import attr

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.homeserver import Cancellable, Homeserver
from synapse_sticky.homeserver.causes import is_outage
from synapse_sticky.logs import bounded

logger = bounded(__name__)

T = TypeVar("T")

_CHECK_MIN_MS = 1_000
_CHECK_MAX_MS = 60_000
_RETRY = Backoff(_CHECK_MIN_MS, _CHECK_MAX_MS)
_FORGIVEN_AFTER_MS = 600_000
"""A failure that long ago does not count any more."""


@attr.s(auto_attribs=True, slots=True)
class Failures:
    """How often in a row a push has failed, when it did last, and until when it is left alone."""

    count: int = 0
    last_ms: int = 0
    retry_ms: int = 0

    def add(self, now_ms: int) -> int:
        """One more. Gives for how many ms the push is left alone."""
        is_again = now_ms - self.last_ms < _FORGIVEN_AFTER_MS
        self.count = self.count + 1 if is_again else 1
        delay_ms = _RETRY.after(self.count)
        self.last_ms, self.retry_ms = now_ms, now_ms + delay_ms
        return delay_ms


@attr.s(auto_attribs=True, slots=True)
class Destination:
    """What one destination is pushed.

    pushes: by room ID; the rooms take turns in this order.
    failures: of those that failed, by room ID.
    check_interval_ms: how long after a check the next one is due. It doubles with each check, and
        is reset by progress.
    next_check_ms: when the next check of a push that has nothing to send is due.
    """

    pushes: dict[str, Push] = attr.Factory(dict)
    failures: dict[str, Failures] = attr.Factory(dict)
    timer: Cancellable | None = None
    check_interval_ms: int = _CHECK_MIN_MS
    next_check_ms: int = 0

    def progressed(self) -> None:
        """There may be something to do now: the next check is due soon."""
        self.check_interval_ms = _CHECK_MIN_MS
        self.next_check_ms = 0

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much: what is due keeps its distance."""
        self.next_check_ms += by_ms
        for failures in self.failures.values():
            failures.last_ms += by_ms
            failures.retry_ms += by_ms
        for push in self.pushes.values():
            push.clock_set(by_ms)

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
        homeserver.on_clock_set(self._clock_set)

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
        state.failures.pop(push.room_id, None)
        state.progressed()

    def remove(self, push: Push) -> None:
        """Removes the push, which must be there."""
        state = self._destinations[push.destination]
        del state.pushes[push.room_id]
        state.failures.pop(push.room_id, None)
        if not state.pushes:
            del self._destinations[push.destination]
            state.cancel_timer()

    def is_current(self, push: Push) -> bool:
        """Is the push still there, and not another one to the same room?"""
        return self.find(push.destination, push.room_id) is push

    def progressed(self, destination: str) -> None:
        """There may be something to do for the destination now: its next check is due soon."""
        if (state := self._destinations.get(destination)) is not None:
            state.progressed()

    def _clock_set(self, by_ms: int) -> None:
        for state in self._destinations.values():
            state.clock_set(by_ms)

    # One that fails costs only itself (H1)

    async def apart(self, push: Push, do: Callable[[Push], Awaitable[T]]) -> T | None:
        """Does something with one push. If it fails, the push is put last and left alone for a
        while, longer each time, whoever asks for it meanwhile (H2).

        Returns:
            What ``do`` gives; None if it fails, or if the push is left alone.

        Raises:
            Exception: the database is away. Then no other push is worth a try.
        """
        if self.is_failing(push):
            return None
        try:
            return await do(push)
        except Exception as e:
            self._failed(push, e)
            if is_outage(e):
                raise
            return None

    def _failed(self, push: Push, error: Exception) -> None:
        if not self.is_current(push):
            return
        self.put_last(push)
        of_rooms = self._destinations[push.destination].failures
        failures = of_rooms.setdefault(push.room_id, Failures())
        delay_ms = failures.add(self._homeserver.now_ms())
        logger.error(
            "Could not look after what %s is pushed of %s, trying again in %d ms: %s: %s",
            push.destination,
            push.room_id,
            delay_ms,
            type(error).__name__,
            error,
            exc_info=error if failures.count == 1 else None,
        )

    def is_failing(self, push: Push) -> bool:
        """Is the push left alone, as it has failed?"""
        return self._retry_ms(push) > self._homeserver.now_ms()

    def _retry_ms(self, push: Push) -> int:
        if not self.is_current(push):
            return 0
        failures = self._destinations[push.destination].failures.get(push.room_id)
        return failures.retry_ms if failures is not None else 0

    def put_last(self, push: Push) -> None:
        """The other rooms of the destination have their turn first."""
        if self.is_current(push):
            pushes = self._destinations[push.destination].pushes
            pushes[push.room_id] = pushes.pop(push.room_id)

    # Timers

    def schedule(self, destination: str) -> None:
        """Sets the destination's timer. It fires when an event is due, when the watch of a settled
        push ends, or when a push that is not settled is to be checked again."""
        state = self._destinations.get(destination)
        if state is None:
            return
        now_ms = self._homeserver.now_ms()
        times = []
        for push in state.pushes.values():
            retry_ms = self._retry_ms(push) if state.failures else 0
            if (push_ms := push.next_due_ms(now_ms)) is not None:
                times.append(max(push_ms, retry_ms))
            if not push.is_open:
                watch_until_ms = push.watch_until_ms if push.is_settled else 0
                times.append(max(watch_until_ms, state.next_check_ms, retry_ms))
        due_ms = min(times, default=now_ms + _CHECK_MAX_MS)
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
