"""Pushes, for the tests of their bookkeeping."""

from synapse_sticky.handlers.joins.push import Push


def choose(push: Push, limit: int, now_ms: int) -> list[str]:
    """What is sent now, at most so many events; the database has all of them."""
    return push.send(push.next_events(limit, now_ms), now_ms)
