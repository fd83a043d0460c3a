"""Trying again: one timer and one log line a step, whatever wakes the job meanwhile (H2)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from synapse_sticky.backoff import Backoff, Retrying


class Clock:
    """Runs what is due when it is told."""

    def __init__(self) -> None:
        self.timers: list[tuple[int, Callable[..., Awaitable[None]]]] = []
        self.started = 0

    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        self.started += 1
        _run(function(*args))

    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None:
        self.timers.append((delay_ms, function))

    def fire(self) -> int:
        """Runs the only timer there is; gives its delay."""
        ((delay_ms, function),) = self.timers
        self.timers.clear()
        _run(function())
        return delay_ms


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
