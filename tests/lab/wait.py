"""The lab's one way to wait: for a condition."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

patience_s = 60.0
"""How long is waited for anything where nothing else is said."""


def wait_until(
    condition: Callable[[], T],
    what: str,
    timeout_s: float | None = None,
    look: Callable[[], object] | None = None,
) -> T:
    """Asks until the condition is true, and gives its value.

    Raises:
        AssertionError: it was not within the time; says what was waited for and the last value, or
            what there is to see then instead.
    """
    timeout_s = patience_s if timeout_s is None else timeout_s
    deadline = time.monotonic() + timeout_s
    pause_s = 0.01
    while not (value := condition()):
        if time.monotonic() > deadline:
            seen = value if look is None else look()
            raise AssertionError(f"waited {timeout_s:.0f} s for {what}; last seen: {seen!r}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.25)
    return value
