"""What sticky events cost where thousands of servers have newly joined the room and do not answer.

The module's own part is measured in this process: its real bookkeeping and index, with a clock that
is made up. It is compared with what a homeserver takes for a sticky event without newcomers.
"""

import time
from collections.abc import Callable

from benchmarks.harm import Case, Figures, Goal
from benchmarks.receipt import cpu_s
from tests.integration.rooms import NO_LIMITS, room_of
from tests.lab import Lab
from tests.unit.test_watched import Crowd

_NEWCOMERS = 1_250
_EVENTS = 20
_BY_HAND = 60
_APART_MS = 3_000


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
    """Notes the longest time from one turn of the others to the next, in seconds of CPU."""

    longest_s = 0.0
    _since_s = 0.0

    async def give_way(self) -> None:
        self.turn()

    def turn(self) -> None:
        now_s = time.process_time()
        self.longest_s = max(self.longest_s, now_s - self._since_s)
        self._since_s = now_s

    def begin(self) -> None:
        self.longest_s, self._since_s = 0.0, time.process_time()

    def run(self, for_ms: int) -> None:
        # Each of the reactor's turns is a millisecond or more.
        for _ in range(for_ms):
            self._since_s = time.process_time()
            super().run(1)
            self.turn()


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
    crowd = _Timed(_NEWCOMERS * size, watched=_NEWCOMERS * size)
    crowd.settle_all()
    crowd.begin()
    by_own = _event_s(crowd, crowd.send) - _event_s(nobody, nobody.send)
    longest_s = crowd.longest_s
    # Those who are behind are tried again now and then; that is not because of an event.
    idle_s = _event_s(crowd, lambda: None)
    by_other = _event_s(crowd, lambda: crowd.send("@bob:there")) - idle_s
    return {
        "an own event, by one without newcomers": 1 + by_own / plain_s,
        "an event of another, by one without newcomers": 1 + by_other / plain_s,
        "longest hold": longest_s * 1000,
    }


CASES = (
    Case(
        "watched: 5,000 newcomers that do not answer",
        watched,
        {
            "an own event, by one without newcomers": Goal(2),
            "an event of another, by one without newcomers": Goal(1.1, growth=1.5),
            "longest hold": Goal(5, growth=1.5, unit="ms"),
        },
    ),
)
