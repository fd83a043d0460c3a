"""The one way to wait and to try again (H2): one timer, one log line a step, bounded.

``Backoff`` says how long a delay is. ``Retrying`` runs a job, and runs it again after a failure.
``Alarm`` runs a job at a time. Apart from ``homeserver``, nothing else sets a timer for a job.
"""

import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import attr

logger = logging.getLogger(__name__)

FORGIVEN_AFTER_MS = 600_000
"""A setback that long ago does not count any more."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Backoff:
    """A delay that doubles from ``min_ms`` to ``max_ms``, give or take a fifth.

    ``spread`` is that fifth; 0 gives the delays themselves.
    """

    min_ms: int
    max_ms: int
    spread: float = 0.2

    def after(self, failures: int) -> int:
        """The delay in ms after this many failures or attempts (at least one)."""
        delay_ms = min(self.min_ms << min(failures - 1, 40), self.max_ms)
        return int(delay_ms * random.uniform(1 - self.spread, 1 + self.spread))


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None: ...
    def active(self) -> bool: ...


class Clock(Protocol):
    """What waiting needs of the homeserver."""

    def now_ms(self) -> int: ...
    def steady_ms(self) -> int: ...
    def in_background(
        self, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> None: ...
    def call_later(
        self, delay_ms: int, what: str, function: Callable[..., Awaitable[None]], *args: Any
    ) -> Timer: ...


class Alarm:
    """Calls a coroutine function at the earliest of the times that it was told since the last call.

    Args:
        what: names the background process.
        function: is called without arguments.
    """

    def __init__(self, clock: Clock, what: str, function: Callable[[], Awaitable[None]]) -> None:
        self._clock = clock
        self._what = what
        self._function = function
        self._timer: Timer | None = None
        self._due_ms = 0

    def ring_at(self, due_ms: int) -> None:
        """Calls at this time, in ms since the epoch, if not earlier."""
        self.ring_in(due_ms - self._clock.now_ms())

    def ring_in(self, delay_ms: int) -> None:
        """Calls after this delay, if not earlier."""
        due_ms = self._clock.steady_ms() + delay_ms
        if self._timer is not None and self._timer.active():
            # Never postponed: a flood faster than the pause would postpone it for ever.
            if self._due_ms <= due_ms:
                return
            self._timer.cancel()
        self._due_ms = due_ms
        self._timer = self._clock.call_later(delay_ms, self._what, self._function)


class Retrying:
    """A job that is run whenever somebody wakes it, one run at a time.

    A job that fails is run again after the backoff's delay. Until then nothing shortens the delay
    and nothing adds a timer or a log line: a wake-up is only remembered.
    """

    def __init__(
        self,
        clock: Clock,
        what: str,
        problem: str,
        job: Callable[[], Awaitable[None]],
        backoff: Backoff,
        *,
        is_said_once: bool = False,
    ) -> None:
        """
        Args:
            what: the job's name, for Synapse's metrics.
            problem: the start of the log line of a failure, such as "Could not read who joined".
            job: does all there is to do; it is run once more if it is woken while it runs.
            is_said_once: the first of several failures in a row has a line, without a traceback;
                those after it are for the level DEBUG.
        """
        self._clock = clock
        self._what = what
        self._problem = problem
        self._job = job
        self._backoff = backoff
        self._is_said_once = is_said_once
        self._woken = False
        self._failures = 0
        self._setbacks = 0
        self._set_back_ms = 0
        self.is_running = False
        self._is_waiting = False

    @property
    def is_failing(self) -> bool:
        """Did the last run fail?"""
        return self._failures > 0

    def wake(self) -> None:
        """Runs the job now; after the present run if it runs, after the delay if it failed."""
        self._woken = True
        if not self.is_running and not self._is_waiting:
            self.is_running = True
            self._clock.in_background(self._what, self._run)

    async def run(self) -> None:
        """Does as ``wake``, and waits until the run has ended, well or not."""
        self._woken = True
        if not self.is_running and not self._is_waiting:
            self.is_running = True
            await self._run()

    def set_back(self, problem: str) -> None:
        """What earlier runs did is of no use any more: the job is run again after a delay.

        The delay grows with each time within ten minutes, as if runs had failed. While the job
        runs or waits, this is only a wake-up.

        Args:
            problem: the start of the log line, in the place of the one of a failure.
        """
        self._woken = True
        if self.is_running or self._is_waiting:
            return
        now_ms = self._clock.steady_ms()
        is_again = 0 <= now_ms - self._set_back_ms < FORGIVEN_AFTER_MS
        self._setbacks = self._setbacks + 1 if is_again else 1
        self._set_back_ms = now_ms
        self._failures = self._setbacks
        delay_ms = self._backoff.after(self._failures)
        logger.error("%s, trying again in %d ms", problem, delay_ms)
        self._wait(delay_ms)

    def _wait(self, delay_ms: int) -> None:
        self._is_waiting = True
        self._clock.call_later(delay_ms, f"{self._what}_retry", self._end_of_delay)

    async def _run(self) -> None:
        try:
            while self._woken:
                self._woken = False
                await self._job()
                self._failures = 0
        except Exception as e:
            self._failures += 1
            delay_ms = self._backoff.after(self._failures)
            if self._is_said_once:
                level = logging.DEBUG if self._failures > 1 else logging.WARNING
                logger.log(level, "%s, trying again in %d ms: %s", self._problem, delay_ms, e)
            else:
                logger.exception("%s, trying again in %d ms", self._problem, delay_ms)
            self._wait(delay_ms)
        finally:
            self.is_running = False

    async def _end_of_delay(self) -> None:
        self._is_waiting = False
        self.wake()
