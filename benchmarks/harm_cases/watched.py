"""What sticky events cost where thousands of servers have newly joined the room and do not answer.

The module's own part is measured in this process: its real bookkeeping and index, with a clock that
is made up. It is compared with what a homeserver takes for a sticky event without newcomers.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

from twisted.internet import defer

from benchmarks.harm import Case, Figures, Goal
from benchmarks.receipt import cpu_s
from tests.integration.rooms import NO_LIMITS, room_of
from tests.lab import Lab
from tests.unit.test_questions import Timer
from tests.unit.test_watched import Crowd

_NEWCOMERS = 1_250
_EVENTS = 10
_BY_HAND = 60
_APART_MS = 3_000
_UNTIL_QUIET_MS = 130_000


def _plain_s(lab: Lab) -> float:
    """The CPU time that a homeserver takes for a sticky event, in seconds."""
    (server,) = lab.servers({"config": NO_LIMITS})
    alice = server.user()
    room_id = room_of(alice, via=server)
    for _ in range(_BY_HAND):
        alice.send_sticky(room_id)
    before_s = cpu_s(server)
    for _ in range(_BY_HAND):
        alice.send_sticky(room_id)
    return (cpu_s(server) - before_s) / _BY_HAND


class _Timed(Crowd):
    """Each millisecond of its clock is one of the reactor's turns. Notes the longest, in seconds of
    CPU."""

    longest_s = 0.0
    is_running = False

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Timer:  # type: ignore[override]
        timer: Timer = self.clock.call_later(delay_ms, what, _begun, function, *args)
        return timer

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        defer.ensureDeferred(function(*args))

    async def give_way(self) -> None:
        if not self.is_running:
            return
        turn: defer.Deferred[None] = defer.Deferred()

        async def fire() -> None:
            turn.callback(None)

        self.clock.call_later(1, "turn", fire)
        await turn

    def run(self, for_ms: int) -> None:
        self.is_running = True
        for _ in range(for_ms):
            since_s = time.process_time()
            super().run(1)
            self.longest_s = max(self.longest_s, time.process_time() - since_s)


async def _begun(function: Any, *args: Any) -> None:
    defer.ensureDeferred(function(*args))


def _event_s(crowd: _Timed, send: Callable[[], object]) -> float:
    """The CPU time of an event, in seconds, with all that the module does for it afterwards."""
    before_s = time.process_time()
    for _ in range(_EVENTS):
        send()
        crowd.run(_APART_MS)
    return (time.process_time() - before_s) / _EVENTS


def watched(lab: Lab, size: int) -> Figures:
    """Own events and those of others, where so many newcomers are watched."""
    plain_s = _plain_s(lab)
    nobody = _Timed(0)
    count = _NEWCOMERS * size
    crowd = _Timed(count, watched=count)
    crowd.settle_all()
    gc.collect()
    gc.disable()  # what is made up here has many more objects than a homeserver has of this
    try:
        crowd.run(10)  # its clock drops what was cancelled
        crowd.longest_s = 0.0
        before_s = time.process_time()
        crowd.send()
        crowd.run(_APART_MS)
        first_s = time.process_time() - before_s
        crowd.run(_UNTIL_QUIET_MS)
        # Those who are behind are tried again now and then; that is not because of an event.
        idle_s = _event_s(crowd, lambda: None)
        by_own = _event_s(crowd, crowd.send) - idle_s
        by_nobody = _event_s(nobody, nobody.send) - _event_s(nobody, lambda: None)
        by_other = _event_s(crowd, lambda: crowd.send("@bob:there")) - idle_s
    finally:
        gc.enable()
    return {
        "an own event, by one without newcomers": 1 + max(by_own - by_nobody, 0) / plain_s,
        "an event of another, by one without newcomers": 1 + max(by_other, 0) / plain_s,
        "the first own event, for each newcomer": first_s / count * 1000,
        "longest hold": crowd.longest_s * 1000,
    }


CASES = (
    Case(
        "watched: 5,000 newcomers that do not answer",
        watched,
        {
            "an own event, by one without newcomers": Goal(2, growth=1.5),
            "an event of another, by one without newcomers": Goal(1.1, growth=1.5),
            "the first own event, for each newcomer": Goal(0.5, growth=1.5, unit="ms"),
            "longest hold": Goal(5, unit="ms"),
        },
    ),
)
