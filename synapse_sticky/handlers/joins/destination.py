"""What is known of one destination that something is pushed to."""

import attr

from synapse_sticky.backoff import FORGIVEN_AFTER_MS, Backoff
from synapse_sticky.handlers.joins.due import DueTimes
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.homeserver import Cancellable

CHECK_MIN_MS = 1_000
"""The time between the first checks of a destination."""

_RETRY = Backoff(CHECK_MIN_MS, 60_000)


@attr.s(auto_attribs=True, slots=True)
class Failures:
    """How often in a row a push has failed, when it did last, and until when it is left alone."""

    count: int = 0
    last_ms: int = 0
    retry_ms: int = 0

    def add(self, now_ms: int) -> int:
        """One more. Gives for how many ms the push is left alone."""
        is_again = now_ms - self.last_ms < FORGIVEN_AFTER_MS
        self.count = self.count + 1 if is_again else 1
        delay_ms = _RETRY.after(self.count)
        self.last_ms, self.retry_ms = now_ms, now_ms + delay_ms
        return delay_ms


@attr.s(auto_attribs=True, slots=True)
class Looks:
    """How often in a row a push was looked at in vain, and until when that is not done again."""

    count: int = 0
    next_ms: int = 0


@attr.s(auto_attribs=True, slots=True)
class Destination:
    """What one destination is pushed; all of it is by room ID.

    failures: of the pushes that failed.
    looks: of the pushes that were looked at in vain.
    sends: when something is to be sent. Of those that are due, the one due first has its turn.
    checks: when a push is to be looked at that has nothing to send.
    unrecorded: the rooms of which events were acknowledged since Synapse recorded how far its
        ordinary queue got.
    has_backlog: may Synapse's backlog have what no push has taken over?
    check_interval_ms: how long after a check the next one is due. It doubles with each check, and
        is reset by progress.
    timer_ms: when the timer fires, by the clock that nobody sets.
    next_check_ms: when the next check of a push that has nothing to send is due.
    """

    pushes: dict[str, Push] = attr.Factory(dict)
    failures: dict[str, Failures] = attr.Factory(dict)
    looks: dict[str, Looks] = attr.Factory(dict)
    sends: DueTimes = attr.Factory(DueTimes)
    checks: DueTimes = attr.Factory(DueTimes)
    unrecorded: dict[str, None] = attr.Factory(dict)
    has_backlog: bool = True
    timer: Cancellable | None = None
    timer_ms: int = 0
    check_interval_ms: int = CHECK_MIN_MS
    next_check_ms: int = 0

    def check_soon(self) -> None:
        """There may be something to do now: the next check is due soon."""
        self.check_interval_ms = CHECK_MIN_MS
        self.next_check_ms = 0

    def clock_set(self, by_ms: int) -> None:
        """The clock was set by so much: what waits for a time keeps its distance."""
        self.next_check_ms += by_ms
        for failures in self.failures.values():
            failures.last_ms += by_ms
            failures.retry_ms += by_ms
        for looks in self.looks.values():
            looks.next_ms += by_ms
        for push in self.pushes.values():
            push.clock_set(by_ms)

    def forget(self, room_id: str) -> None:
        """The push of the room is another one, or gone."""
        for by_room in (self.failures, self.looks, self.unrecorded):
            by_room.pop(room_id, None)

    def is_set_for(self, due_ms: int, *, within_ms: int) -> bool:
        """Does the timer fire at about this time, by the clock that nobody sets?"""
        is_set = self.timer is not None and self.timer.active()
        return is_set and abs(self.timer_ms - due_ms) <= within_ms

    def cancel_timer(self) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
