"""What counting and timing add to each question of a sync for its sticky events.

Beside it stands the time in which the index answers such a question: benchmarks.delivery.
"""

import platform
import timeit
from collections.abc import Callable, Coroutine
from typing import Any

from synapse_sticky.metrics import Metrics
from tests.lab.say import say

_CALLS = 100_000
_REPEATS = 7


async def _answer() -> None:
    """A question that costs nothing."""


def _run(function: Callable[[], Any]) -> None:
    coroutine: Coroutine[Any, Any, None] = function()
    try:
        coroutine.send(None)
    except StopIteration:
        return


def _best_us(call: Callable[[], None]) -> float:
    return min(timeit.repeat(call, number=_CALLS, repeat=_REPEATS)) / _CALLS * 1e6


def main() -> None:
    """Prints both times and the difference."""
    metrics = Metrics("benchmark")
    timed = metrics.timed("delivery", "sync", _answer)

    def counted() -> None:
        _run(timed)
        metrics.answered("index")

    without_us, with_us = _best_us(lambda: _run(_answer)), _best_us(counted)
    say(f"a question of a sync: {without_us:.2f} us without metrics, {with_us:.2f} us with them")
    say(f"so a sync pays {with_us - without_us:.2f} us (Python {platform.python_version()})")


if __name__ == "__main__":
    main()
