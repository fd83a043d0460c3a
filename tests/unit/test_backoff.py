"""Trying again: one timer and one log line a step, whatever wakes the job meanwhile (H2)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import attr
import pytest

from synapse_sticky.backoff import Alarm, Backoff, Retrying
from tests.unit.settable import Settable


@attr.s(auto_attribs=True, eq=False)
class Timer:
    clock: "Clock"
    delay_ms: int
    function: Callable[..., Awaitable[None]]

    def active(self) -> bool:
        return self in self.clock.timers

    def cancel(self) -> None:
        self.clock.timers.remove(self)


class Clock(Settable):
    """Runs what is due when it is told."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.started = 0
        self.clock_ms = 1_000_000

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        self.started += 1
        _run(function(*args))

    def now_ms(self) -> int:
        return self.clock_ms + self.set_by_ms

    def steady_ms(self) -> int:
        return self.clock_ms

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Timer:
        self.timers.append(timer := Timer(self, delay_ms, function))
        return timer

    def fire(self) -> int:
        """Runs the only timer there is; gives its delay."""
        (timer,) = self.timers
        self.timers.clear()
        self.clock_ms += timer.delay_ms
        _run(timer.function())
        return timer.delay_ms


def _run(awaitable: Awaitable[None]) -> None:
    async def wait() -> None:
        await awaitable

    # A job that waits for something is driven by hand.
    coroutine = wait()
    try:
        coroutine.send(None)
    except StopIteration:
        pass


class Job:
    def __init__(self) -> None:
        self.runs = 0
        self.fails = False
        self.during: Callable[[], None] = lambda: None

    async def __call__(self) -> None:
        self.runs += 1
        self.during()
        if self.fails:
            raise OSError("the database is away")


def retrying(clock: Clock, job: Job) -> Retrying:
    return Retrying(clock, "job", "Could not do it", job, Backoff(1_000, 60_000, spread=0))


@pytest.mark.requirement("H2")
def test_a_thousand_ticks_while_it_fails_are_one_attempt(caplog: pytest.LogCaptureFixture) -> None:
    clock, job = Clock(), Job()
    job.fails = True
    task = retrying(clock, job)
    with caplog.at_level(logging.INFO):
        for _ in range(1_000):
            task.wake()
        assert job.runs == clock.started == len(clock.timers) == len(caplog.records) == 1
        assert "Could not do it, trying again in 1000 ms" in caplog.text
        delays = []
        for step in range(8):
            delays.append(clock.fire())
            for _ in range(100):
                task.wake()
            assert len(clock.timers) == 1
            assert len(caplog.records) == job.runs == step + 2
    assert delays == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]


@pytest.mark.requirement("H2")
def test_once_it_goes_well_the_delay_is_short_again() -> None:
    clock, job = Clock(), Job()
    task = retrying(clock, job)
    job.fails = True
    task.wake()
    clock.fire()
    assert task.is_failing
    job.fails = False
    assert clock.fire() == 2_000
    assert not task.is_failing
    assert not clock.timers
    job.fails = True
    task.wake()
    assert clock.fire() == 1_000


def test_woken_while_it_runs_it_runs_once_more() -> None:
    clock, job = Clock(), Job()
    task = retrying(clock, job)

    def wake_twice() -> None:
        if job.runs == 1:
            task.wake()
            task.wake()

    job.during = wake_twice
    task.wake()
    assert (job.runs, clock.started) == (2, 1)
    task.wake()
    assert (job.runs, clock.started) == (3, 2)


def test_run_waits_for_the_end() -> None:
    clock, job = Clock(), Job()
    asyncio.run(retrying(clock, job).run())
    assert (job.runs, clock.started) == (1, 0)


def test_a_delay_is_spread_but_bounded() -> None:
    backoff = Backoff(1_000, 60_000)
    delays = [backoff.after(3) for _ in range(1_000)]
    assert 3_200 <= min(delays) < max(delays) <= 4_800
    assert backoff.after(10**6) <= 72_000


@pytest.mark.requirement("H2")
def test_a_thousand_setbacks_are_one_attempt_a_step(caplog: pytest.LogCaptureFixture) -> None:
    """What a job did is of no use again and again, although the job itself does not fail."""
    clock, job = Clock(), Job()
    task = retrying(clock, job)
    delays = []
    for step in range(8):
        for _ in range(1_000):
            task.set_back("It is broken")
        assert job.runs == step
        assert len(caplog.records) == step + 1
        delays.append(clock.fire())
    assert "It is broken, trying again in 1000 ms" in caplog.text
    assert delays == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]
    clock.clock_ms += 600_000
    task.set_back("It is broken")
    assert clock.fire() == 1_000, "ten minutes later all is forgiven"


@pytest.mark.requirement("H2")
def test_an_alarm_has_one_timer_that_nothing_puts_off() -> None:
    clock, job = Clock(), Job()
    alarm = Alarm(clock, "job", job)
    for later_ms in range(1_000):
        alarm.ring_in(5_000 + later_ms)
    assert [timer.delay_ms for timer in clock.timers] == [5_000]
    alarm.ring_in(20)
    assert [timer.delay_ms for timer in clock.timers] == [20]
    clock.fire()
    assert job.runs == 1
    alarm.ring_at(clock.now_ms() + 7)
    assert clock.fire() == 7
