"""One that cannot be done costs only itself (H1): many are done at once, or else each by itself.

``apart`` finds the ones that fail. ``Stragglers`` tries them again, each by itself, while all
others go on. ``each`` goes through what was noted, one by one.
"""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Generic, TypeVar

from synapse_sticky.backoff import Backoff, Clock, Retrying
from synapse_sticky.homeserver.causes import is_outage
from synapse_sticky.logs import bounded

logger = bounded(__name__)

T = TypeVar("T")

_HOUR_MS = 3_600_000
"""Nothing is sticky for longer."""

_MOST_FAILURES = 10
"""So many items in a row may fail in a step: one whose fault is gone does not wait a step for each
that fails for good."""


async def apart(
    items: Sequence[T], do: Callable[[Sequence[T]], Awaitable[None]]
) -> list[tuple[T, Exception]]:
    """Does all of the items at once; if that fails, halves of them, down to each by itself.

    One bad item of n costs about 2 log n attempts; n bad ones cost 2 n.

    Args:
        do: does some of the items, or raises and has done none of them.

    Returns:
        The items that cannot be done, each with its error.

    Raises:
        Exception: the database is away. Then it is not the items' fault, and nothing smaller is
            tried. Some of the items may have been done.
    """
    if not items:
        return []
    try:
        await do(items)
        return []
    except Exception as e:
        if is_outage(e):
            raise
        if len(items) == 1:
            return [(items[0], e)]
    half = len(items) // 2
    return [*await apart(items[:half], do), *await apart(items[half:], do)]


async def each(noted: MutableMapping[T, None], do: Callable[[T], Awaitable[None]]) -> None:
    """Takes out what is noted by now, and does it, one after the other.

    One that fails is noted again, and the others go on. An outage ends the round.

    Raises:
        Exception: the last failure, for whoever tries again.
    """
    problem: Exception | None = None
    for item in [*noted]:
        # Out before it is done, as it may be noted once more meanwhile.
        del noted[item]
        try:
            await do(item)
        except Exception as e:  # noqa: BLE001 - raised below, after the others
            noted[item], problem = None, e
            if is_outage(e):
                break
    if problem is not None:
        raise problem


class Stragglers(Generic[T]):
    """Items that could not be done, each tried again by itself, in turns.

    However many there are, there are ten attempts, one log line and one timer a step; one attempt
    while the database is away. As soon as one of them can be done, more are tried at once. One that
    fails for an hour is given up.
    """

    def __init__(
        self,
        clock: Clock,
        what: str,
        problem: str,
        do: Callable[[T], Awaitable[None]],
        backoff: Backoff,
        most: int,
    ) -> None:
        """
        Args:
            what: the job's name, for Synapse's metrics.
            problem: the start of the log line of a failure, such as "Could not release".
            do: does one item.
            most: how many there may be; the longest there are given up for further ones.
        """
        self._clock = clock
        self._problem = problem
        self._do = do
        self._most = most
        self._since_ms: dict[T, int] = {}
        self._trying = Retrying(clock, what, problem, self._try, backoff)

    def __contains__(self, item: object) -> bool:
        return item in self._since_ms

    def __len__(self) -> int:
        return len(self._since_ms)

    def items(self) -> Iterable[T]:
        """All of them."""
        return self._since_ms.keys()

    def add(self, failed: Iterable[tuple[T, Exception]]) -> None:
        """Takes items, each with the error of its last attempt."""
        now_ms = self._clock.steady_ms()
        for item, error in failed:
            self._since_ms.setdefault(item, now_ms)
            logger.debug("%s %s", self._problem, item, exc_info=error)
            self._trying.set_back(f"{self._problem} {item}: {type(error).__name__}: {error}")
        while len(self._since_ms) > self._most:
            self._give_up(next(iter(self._since_ms)), "there are too many")

    def _give_up(self, item: T, why: str) -> None:
        logger.warning("%s %s; it is given up: %s", self._problem, item, why)
        del self._since_ms[item]

    async def _try(self) -> None:
        failed: Exception | None = None
        failures = 0
        for item in list(self._since_ms):
            try:
                await self._do(item)
            except Exception as e:
                self._put_last(item)
                failed = e
                failures += 1
                if failures == _MOST_FAILURES or is_outage(e):
                    raise
            else:
                self._since_ms.pop(item, None)
                failures = 0
        if failed is not None:
            raise failed

    def _put_last(self, item: T) -> None:
        since_ms = self._since_ms.pop(item, None)
        if since_ms is not None:
            self._since_ms[item] = since_ms
            if self._clock.steady_ms() - since_ms >= _HOUR_MS:
                self._give_up(item, "it has failed for an hour")
