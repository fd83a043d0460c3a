"""The pushes of each destination, and the one timer that a destination's pushes share."""

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from synapse_sticky.backoff import Backoff
from synapse_sticky.handlers.joins.destination import (
    CHECK_MIN_MS,
    Destination,
    Failures,
    Looks,
)
from synapse_sticky.handlers.joins.federation import LONGEST_BACKOFF_MS
from synapse_sticky.handlers.joins.push import WATCH_AFTER_RECORD_MS, Push
from synapse_sticky.handlers.joins.rooms import PushedRooms
from synapse_sticky.homeserver import Homeserver
from synapse_sticky.homeserver.causes import is_outage
from synapse_sticky.logs import bounded

logger = bounded(__name__)

T = TypeVar("T")

_CHECK_MAX_MS = 60_000
_LOOK = Backoff(CHECK_MIN_MS, _CHECK_MAX_MS, spread=0)
_LOOK_AT_BLOCKED = Backoff(CHECK_MIN_MS, LONGEST_BACKOFF_MS, spread=0)
"""A change of the room's state ends it (``reopening``). This is for what that may have missed."""


class Destinations:
    """All pushes of this process."""

    def __init__(
        self,
        homeserver: Homeserver,
        rooms: PushedRooms,
        *,
        check: Callable[[str], Awaitable[int]],
        wake: Callable[[str], Awaitable[None]],
    ) -> None:
        """
        Args:
            rooms: is kept in step with the pushes that there are.
            check: ends what has expired; gives when the destination's back-off ends (ms since the
                epoch).
            wake: has Synapse ask for a batch of the destination, unless it is backed off.
        """
        self._homeserver = homeserver
        self._rooms = rooms
        self._check = check
        self._wake = wake
        self._destinations: dict[str, Destination] = {}
        # By destination and room, the oldest first: those that may lack something, and since when.
        self._open: dict[tuple[str, str], int] = {}
        homeserver.metrics.show("newcomers_open", self, Destinations.open_count)
        homeserver.metrics.show("newcomer_oldest_seconds", self, Destinations.oldest_s)
        homeserver.on_clock_set(self._clock_set)

    def names(self) -> list[str]:
        """All destinations that something is pushed to, or watched for."""
        return list(self._destinations)

    def is_known(self, destination: str) -> bool:
        """Is something pushed to the destination, or watched for?"""
        return destination in self._destinations

    def pushes_of(self, destination: str) -> list[Push]:
        """All pushes of the destination."""
        state = self._destinations.get(destination)
        return list(state.pushes.values()) if state else []

    def find(self, destination: str, room_id: str) -> Push | None:
        """The push of the room to the destination, None if there is none."""
        state = self._destinations.get(destination)
        return state.pushes.get(room_id) if state else None

    def add(self, push: Push) -> None:
        """Adds the push, in the place of another one to the same room."""
        state = self._destinations.setdefault(push.destination, Destination())
        state.pushes[push.room_id] = push
        self._rooms.add(push)
        state.forget(push.room_id)
        state.check_soon()
        self.update_times(push)

    def open_count(self) -> int:
        """How many pushes are not settled: their newcomers may lack something."""
        return len(self._open)

    def oldest_s(self) -> float:
        """For how many seconds there has been a push that is not settled; 0 if there is none."""
        since_ms = next(iter(self._open.values()), None)
        return 0 if since_ms is None else (self._homeserver.steady_ms() - since_ms) / 1_000

    def remove(self, push: Push) -> None:
        """Removes the push, which must be there."""
        self._open.pop((push.destination, push.room_id), None)
        state = self._destinations[push.destination]
        del state.pushes[push.room_id]
        self._rooms.remove(push)
        state.forget(push.room_id)
        state.sends.set(push.room_id, None)
        state.checks.set(push.room_id, None)
        if not state.pushes:
            del self._destinations[push.destination]
            state.cancel_timer()

    def is_current(self, push: Push) -> bool:
        """Is the push still there, and not another one to the same room?"""
        return self.find(push.destination, push.room_id) is push

    def check_soon(self, destination: str) -> None:
        """There may be something to do for the destination now: its next check is due soon."""
        if (state := self._destinations.get(destination)) is not None:
            state.check_soon()

    def _clock_set(self, by_ms: int) -> None:
        for state in self._destinations.values():
            state.clock_set(by_ms)
            for push in state.pushes.values():
                self.update_times(push)

    # Synapse's own side of a destination

    def has_backlog(self, destination: str) -> bool:
        """May Synapse's backlog of the destination have what no push has taken over?"""
        state = self._destinations.get(destination)
        return state is None or state.has_backlog

    def note_backlog(self, destination: str, *, has_backlog: bool) -> None:
        """Sets what ``has_backlog`` gives; for a destination without pushes that is always True."""
        if (state := self._destinations.get(destination)) is not None:
            state.has_backlog = has_backlog

    def acknowledged(self, push: Push) -> None:
        """What Synapse records next may end the watch of the push."""
        state = self._destinations.get(push.destination)
        ends_later = push.watch_until_ms > self._homeserver.now_ms() + WATCH_AFTER_RECORD_MS
        if state is not None and ends_later and self.is_current(push):
            state.unrecorded[push.room_id] = None

    def recorded(self, destination: str) -> bool:
        """Synapse has recorded how far its ordinary queue got with the destination. Gives whether
        that may change when there is something to do for it."""
        state = self._destinations.get(destination)
        if state is None or not state.unrecorded:
            return False
        unrecorded, state.unrecorded = state.unrecorded, {}
        for room_id in unrecorded:
            state.pushes[room_id].catch_up_recorded(self._homeserver.now_ms())
            self.update_times(state.pushes[room_id])
        return True

    def skipped(self, destination: str) -> None:
        """The ordinary queue may have left out any event: all pushes are dirty."""
        if (state := self._destinations.get(destination)) is None:
            return
        state.has_backlog = True
        state.looks.clear()
        now_ms = self._homeserver.now_ms()
        for push in state.pushes.values():
            push.dirty_marks += 1
            state.checks.set(push.room_id, now_ms)

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
        state = self._destinations[push.destination]
        failures = state.failures.setdefault(push.room_id, Failures())
        delay_ms = failures.add(self._homeserver.now_ms())
        self.update_times(push)
        logger.error(
            "Could not push to %s what it lacks of %s, trying again in %d ms: %s: %s",
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

    def all_fail(self, destination: str) -> bool:
        """Is there something to do, and all of it failing?"""
        state, now_ms = self._destinations.get(destination), self._homeserver.now_ms()
        if state is None or not state.failures:
            return False
        pushes = [push for push in state.pushes.values() if not push.is_idle(now_ms)]
        return bool(pushes) and all(self.is_failing(push) for push in pushes)

    # Whose turn it is. Work follows what is due, not the number of rooms (H3)

    def update_times(self, push: Push) -> None:
        """What there is to do for the push may have changed: finds out when it is due."""
        if not self.is_current(push):
            return
        self._rooms.note_changed(push)
        if push.is_settled:
            self._open.pop((push.destination, push.room_id), None)
        else:
            key = push.destination, push.room_id
            self._open.setdefault(key, self._homeserver.steady_ms())
        state = self._destinations[push.destination]
        now_ms = self._homeserver.now_ms()
        earliest_ms = max(self._retry_ms(push), now_ms)
        send_ms, check_ms = push.next_due_ms(now_ms), self._check_ms(push, state, now_ms)
        state.sends.set(push.room_id, None if send_ms is None else max(send_ms, earliest_ms))
        state.checks.set(push.room_id, None if check_ms is None else max(check_ms, earliest_ms))

    def _check_ms(self, push: Push, state: Destination, now_ms: int) -> int | None:
        looks = state.looks.get(push.room_id)
        if push.is_blocked:
            return looks.next_ms if looks is not None else now_ms
        if push.is_dirty(now_ms):
            return now_ms
        if push.is_idle(now_ms):
            return push.watch_until_ms
        if push.is_open:
            # The questions have timers of their own; this is for what they may have missed.
            is_sent_later = push.next_due_ms(now_ms) is not None
            return None if is_sent_later else now_ms + _CHECK_MAX_MS
        return looks.next_ms if looks is not None else now_ms

    def look_now(self, push: Push) -> None:
        """The same as ``update_times``, and looks in vain do not delay the next one any more."""
        if self.is_current(push):
            self._destinations[push.destination].looks.pop(push.room_id, None)
            self.update_times(push)

    def looked_in_vain(self, push: Push) -> None:
        """The push had nothing to send. The next look is later each time."""
        if not self.is_current(push):
            return
        looks = self._destinations[push.destination].looks.setdefault(push.room_id, Looks())
        looks.count += 1
        backoff = _LOOK_AT_BLOCKED if push.is_blocked else _LOOK
        looks.next_ms = self._homeserver.now_ms() + backoff.after(looks.count)
        self.update_times(push)

    def is_behind(self, push: Push) -> bool:
        """Is something due already, or does something wait for the newcomer's first
        acknowledgement? Then a new event has its turn after that."""
        state = self._destinations.get(push.destination)
        send_ms = state.sends.get(push.room_id) if state else None
        if send_ms is None:
            return False
        return push.awaits_contact or send_ms <= self._homeserver.now_ms()

    def in_turn(self, destination: str) -> Iterator[Push]:
        """The pushes to look at, one after the other, each once. After each, whoever looked has to
        say what came of it (``update_times`` or ``looked_in_vain``)."""
        seen: set[str] = set()
        while (room_id := self._first_due(destination, seen)) is not None:
            seen.add(room_id)
            yield self._destinations[destination].pushes[room_id]

    def _first_due(self, destination: str, seen: set[str]) -> str | None:
        if (state := self._destinations.get(destination)) is None:
            return None
        firsts = [first for times in (state.sends, state.checks) if (first := times.first())]
        now_ms = self._homeserver.now_ms()
        due = [first for first in firsts if first[0] <= now_ms and first[1] not in seen]
        return min(due)[1] if due else None

    def all_due(self, destination: str) -> list[Push]:
        """All pushes to look at now, in no certain order."""
        if (state := self._destinations.get(destination)) is None:
            return []
        now_ms = self._homeserver.now_ms()
        rooms = dict.fromkeys((*state.sends.due(now_ms), *state.checks.due(now_ms)))
        return [state.pushes[room_id] for room_id in rooms]

    # Timers

    def schedule(self, destination: str) -> None:
        """Sets the destination's timer. It fires when an event is due, when the watch of a settled
        push ends, or when a push that is not settled is to be checked again."""
        state = self._destinations.get(destination)
        if state is None:
            return
        now_ms = self._homeserver.now_ms()
        send, check = state.sends.first(), state.checks.first()
        times = [send[0]] if send else []
        times += [max(check[0], state.next_check_ms)] if check else []
        due_ms = min(times, default=now_ms + _CHECK_MAX_MS)
        self._set_timer(max(due_ms - now_ms, 0) + 1, destination, state)

    def _set_timer(self, delay_ms: int, destination: str, state: Destination) -> None:
        due_ms = self._homeserver.steady_ms() + delay_ms
        # This is asked whenever the destination has acknowledged anything. Two clocks that are
        # rounded differ by 1 ms.
        if state.is_set_for(due_ms, within_ms=1):
            return
        state.cancel_timer()
        state.timer_ms = due_ms
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
            retry_ms = retry_at_ms - self._homeserver.now_ms()
            delay_ms = max(delay_ms, min(retry_ms, LONGEST_BACKOFF_MS))
        finally:
            if self._destinations.get(destination) is state:
                state.check_interval_ms = min(state.check_interval_ms * 2, _CHECK_MAX_MS)
                state.next_check_ms = self._homeserver.now_ms() + delay_ms
                self._set_timer(delay_ms, destination, state)
        if destination in self._destinations:
            await self._wake(destination)
