"""Somebody sets the clock by an hour: delays go on, and nothing fires in a storm (H2)."""

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import attr
import pytest
from twisted.internet.defer import ensureDeferred

from synapse_sticky.apart import Stragglers
from synapse_sticky.backoff import Alarm, Backoff, Retrying
from synapse_sticky.handlers.joins.earlier import APART, EarlierPushes
from synapse_sticky.handlers.joins.push import Push
from synapse_sticky.handlers.staging.parking.tables import ParkedTable
from synapse_sticky.homeserver import Signal
from synapse_sticky.homeserver.clock import SetClock
from synapse_sticky.homeserver.layout import migrate
from tests.unit.pushes import choose
from tests.unit.test_limits import done
from tests.unit.test_parking import ROOM, _Homeserver, park

HOUR_MS = 3_600_000
SECOND_MS = 1_000
BOTH = pytest.mark.parametrize("by_ms", [HOUR_MS, -HOUR_MS])


@attr.s(auto_attribs=True, eq=False)
class TwistedTimer:
    """Is due at a time of the wall clock."""

    due_ms: int
    call: Callable[[], Any]
    is_active: bool = True

    def active(self) -> bool:
        return self.is_active

    def cancel(self) -> None:
        assert self.is_active
        self.is_active = False


class Here:
    """A process with Twisted's timers, which go by a wall clock that tests set."""

    def __init__(self) -> None:
        self.passed_ms = 0
        self.wall_ms = 1_800_000_000_000
        self.timers: list[TwistedTimer] = []
        self.fired = 0
        self.turns: list[Callable[[], None]] = []
        self.clock = SetClock(
            lambda: self.wall_ms,
            self._call_by_twisted,
            lambda function, *args: self.turns.append(partial(function, *args)),
            lambda: self.passed_ms / 1_000,
        )
        self.now_ms, self.steady_ms = self.clock.now_ms, self.clock.steady_ms

    def _call_by_twisted(self, delay_ms: int, function: Any, *, desc: str) -> TwistedTimer:
        self.timers.append(timer := TwistedTimer(self.wall_ms + delay_ms, function))
        return timer

    def in_background(self, what: str, function: Any, *args: Any) -> None:
        done(function(*args))

    def call_later(self, delay_ms: int, what: str, function: Any, *args: Any) -> Any:
        return self.clock.call_later(delay_ms, what, partial(function, *args))

    def pass_ms(self, ms: int) -> None:
        """In steps of a tenth of a second; the clock is looked at with each."""
        for _ in range(ms // 100):
            self.passed_ms += 100
            self.wall_ms += 100
            self.clock.now_ms()
            turns, self.turns = self.turns, []
            for turn in turns:
                turn()
            for timer in [t for t in self.timers if t.is_active and t.due_ms <= self.wall_ms]:
                timer.is_active = False
                self.fired += 1
                if (coroutine := timer.call()) is not None:
                    done(coroutine)
            self.timers = [t for t in self.timers if t.is_active]


class Work:
    def __init__(self) -> None:
        self.runs = 0
        self.fails = False

    async def __call__(self, *_: object) -> None:
        self.runs += 1
        if self.fails:
            raise ValueError


@BOTH
@pytest.mark.requirement("H2", "H3")
def test_thousands_of_timers_fire_when_their_delay_is_over(by_ms: int) -> None:
    here, work = Here(), Work()
    for seconds in range(1, 51):
        for _ in range(100):
            here.call_later(seconds * SECOND_MS, "work", work)
    here.pass_ms(2_000)
    assert work.runs == 200
    here.wall_ms += by_ms
    for second in range(3, 51):
        here.pass_ms(SECOND_MS)
        assert 100 * (second - 1) <= work.runs <= 100 * (second + 1)
    here.pass_ms(SECOND_MS)
    assert work.runs == 5_000
    assert here.clock.pending == set()
    assert here.timers == []


@BOTH
def test_a_timer_that_is_cancelled_stays_so(by_ms: int) -> None:
    here, work = Here(), Work()
    delayed = here.call_later(SECOND_MS, "work", work)
    here.wall_ms += by_ms
    here.pass_ms(500)
    assert delayed.active()
    delayed.cancel()
    assert not delayed.active()
    here.pass_ms(5 * SECOND_MS)
    assert work.runs == 0


@BOTH
@pytest.mark.requirement("H2")
def test_whoever_listens_hears_once_and_first(by_ms: int) -> None:
    here, heard = Here(), list[int]()
    here.clock.on_set(heard.append)
    here.pass_ms(60 * SECOND_MS)
    assert heard == []
    steady_ms = here.steady_ms()
    here.wall_ms += by_ms
    assert here.now_ms() == here.wall_ms
    assert heard == [by_ms]
    assert here.steady_ms() == steady_ms
    here.pass_ms(SECOND_MS)
    here.wall_ms -= by_ms
    here.pass_ms(SECOND_MS)
    assert heard == [by_ms, -by_ms]
    assert here.now_ms() == here.steady_ms()


@BOTH
@pytest.mark.requirement("H2")
def test_what_fails_is_tried_again_at_its_pace(by_ms: int) -> None:
    here, work = Here(), Work()
    work.fails = True
    retrying = Retrying(here, "work", "Could not", work, Backoff(4_000, 4_000, spread=0))
    retrying.wake()
    here.pass_ms(SECOND_MS)
    here.wall_ms += by_ms
    here.pass_ms(2 * SECOND_MS)
    assert work.runs == 1
    here.pass_ms(2 * SECOND_MS)
    assert work.runs == 2


@BOTH
@pytest.mark.requirement("H2")
def test_an_alarm_rings_when_the_time_has_passed(by_ms: int) -> None:
    here, work = Here(), Work()
    alarm = Alarm(here, "work", work)
    alarm.ring_in(4_000)
    here.wall_ms += by_ms
    alarm.ring_in(8_000)
    here.pass_ms(3 * SECOND_MS)
    assert work.runs == 0
    here.pass_ms(2 * SECOND_MS)
    assert work.runs == 1
    alarm.ring_at(here.now_ms() + SECOND_MS)
    here.pass_ms(1_200)
    assert work.runs == 2


@BOTH
@pytest.mark.requirement("H2", "L3")
def test_one_that_fails_is_not_given_up_as_the_clock_is_set(by_ms: int) -> None:
    here, work = Here(), Work()
    work.fails = True
    stragglers: Stragglers[str] = Stragglers(
        here, "work", "Could not", work, Backoff(1_000, 1_000, spread=0), 10
    )
    stragglers.add([("$1", ValueError())])
    here.wall_ms += by_ms
    here.pass_ms(5 * SECOND_MS)
    assert "$1" in stragglers
    assert 3 <= work.runs <= 5
    work.fails = False
    here.pass_ms(2 * SECOND_MS)
    assert "$1" not in stragglers


# What is not only a timer


@BOTH
@pytest.mark.requirement("P3", "H2")
def test_a_push_sends_again_when_it_would_have(by_ms: int) -> None:
    now_ms = 10 * HOUR_MS
    backoff = Backoff(5_000, 5_000, spread=0)
    push = Push("there", "!r", position=0, watch_until_ms=now_ms + HOUR_MS, backoff=backoff)
    own = [(1, "$1", "@us:here"), (2, "$2", "@us:here")]
    push.update(own, now_ms, 10)
    assert choose(push, 10, now_ms) == ["$1"]
    now_ms += by_ms + 1_000
    push.clock_set(by_ms)
    assert choose(push, 10, now_ms) == []
    assert push.next_due_ms(now_ms) == now_ms + 4_000
    # It acknowledges one: the other is sent, and sent again after the delay.
    push.acknowledge("$1", now_ms)
    assert choose(push, 10, now_ms) == ["$2"]
    now_ms += by_ms
    push.clock_set(by_ms)
    assert choose(push, 10, now_ms + 4_000) == []
    assert choose(push, 10, now_ms + 5_000) == ["$2"]
    (sent,) = push.unconfirmed()
    assert sent.acknowledged_ms == sent.patient_from_ms == now_ms


@pytest.mark.requirement("P3", "H2")
def test_one_that_joins_again_does_not_wait_for_the_hour_to_pass() -> None:
    earlier, now_ms = EarlierPushes(), 10 * HOUR_MS
    earlier.begin("there", "!r", now_ms)
    now_ms -= HOUR_MS
    _, at_ms = earlier.begin("there", "!r", now_ms)
    assert at_ms - now_ms <= 2 * APART.max_ms
    assert APART.min_ms // 2 < at_ms - now_ms


@pytest.mark.requirement("L3", "H2")
def test_parked_pdus_are_due_after_the_clock_was_set_back() -> None:
    homeserver: Any = _Homeserver()
    homeserver.now = 10 * HOUR_MS
    table = ParkedTable(homeserver)
    asyncio.run(migrate(homeserver, table))
    park(table, "a.test", "$1", due_ms=homeserver.now + SECOND_MS)
    assert asyncio.run(table.due()) == []
    homeserver.set_clock(-HOUR_MS)
    assert asyncio.run(table.due()) == [("a.test", ROOM)]
    (pdu,) = asyncio.run(table.of_room("a.test", ROOM))
    assert pdu.is_due(homeserver.now_ms())
    assert not pdu.is_due(homeserver.now)


@BOTH
@pytest.mark.requirement("H2")
def test_nobody_waits_longer(by_ms: int) -> None:
    """Also who gives way to others while the clock is set, as a loop over a large room does."""
    here = Here()
    signal = Signal(here.call_later)
    waited = [ensureDeferred(signal.wait(ms)) for ms in (0, 1_000)]
    here.wall_ms += by_ms
    here.pass_ms(500)
    assert [one.called for one in waited] == [True, False]
    here.pass_ms(1_000)
    assert waited[1].called
    again = ensureDeferred(signal.wait(1_000))
    signal.fire()
    assert again.called
    assert here.clock.pending == set()


@BOTH
@pytest.mark.requirement("H2")
def test_who_listens_hears_before_anybody_uses_the_new_time(by_ms: int) -> None:
    """Also if a database thread is the first to see it; and one that fails costs no other."""
    here, heard = Here(), list[int]()

    def fails(ms: int) -> None:
        raise ValueError

    here.clock.on_set(fails)
    here.clock.on_set(heard.append)
    here.wall_ms += by_ms
    thread = threading.Thread(target=here.now_ms)
    thread.start()
    thread.join()
    assert heard == [], "it is told in the thread of the reactor"
    here.now_ms()
    assert heard == [by_ms]
    here.pass_ms(SECOND_MS)
    assert heard == [by_ms]
