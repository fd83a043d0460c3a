"""Coroutines that wait for nothing."""

from typing import Any

from twisted.internet.defer import ensureDeferred


def result_of(coroutine: Any) -> Any:
    """What it gives. Raises what it raises."""
    results: list[Any] = []
    ensureDeferred(coroutine).addBoth(results.append)
    (result,) = results
    if hasattr(result, "raiseException"):
        result.raiseException()
    return result
