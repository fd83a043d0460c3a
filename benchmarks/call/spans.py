"""Spans of time, and which of them a client shows wrongly.

Pure: nothing here waits or asks. Times are seconds of one clock.
"""

import math
from collections.abc import Iterable, Sequence

import attr

Span = tuple[float, float]
"""From the first up to the second."""


def intersect(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """What is in both. Each of the two is sorted, and no two of its spans overlap."""
    found, left, right = [], 0, 0
    while left < len(some) and right < len(others):
        start = max(some[left][0], others[right][0])
        end = min(some[left][1], others[right][1])
        if start < end:
            found.append((start, end))
        if some[left][1] < others[right][1]:
            left += 1
        else:
            right += 1
    return found


def complement(spans: Sequence[Span]) -> list[Span]:
    """Everything else."""
    edges = [-math.inf, *(edge for span in spans for edge in span), math.inf]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


def subtract(some: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """What is in the first only."""
    return intersect(some, complement(others))


def shown_spans(changes: Iterable[tuple[float, bool]], end_s: float) -> list[Span]:
    """When a client shows somebody, by when this changed and to what, up to the end."""
    found: list[Span] = []
    since_s: float | None = None
    for at_s, is_shown in [*changes, (end_s, False)]:
        if is_shown and since_s is None:
            since_s = at_s
        elif not is_shown and since_s is not None:
            found.append((since_s, at_s))
            since_s = None
    return [(start, end) for start, end in found if start < end]


@attr.s(auto_attribs=True, frozen=True)
class Change:
    """A participant comes or goes.

    asked_s: when the client sent the request.
    known_s: when the client had the 200. Between the two, nobody can know whether the participant
        is there. Of a delayed leave both are the due times that these give.
    """

    comes: bool
    asked_s: float
    known_s: float


def _stays(changes: Iterable[Change]) -> list[tuple[Change, Change]]:
    """Each coming, with the going that follows. Whoever is there cannot come."""
    never = Change(comes=False, asked_s=math.inf, known_s=math.inf)
    found: list[tuple[Change, Change]] = []
    came: Change | None = None
    for change in sorted(changes, key=lambda c: c.known_s):
        if change.comes and came is None:
            came = change
        elif not change.comes and came is not None:
            found.append((came, change))
            came = None
    return found if came is None else [*found, (came, never)]


def surely_there(changes: Iterable[Change]) -> list[Span]:
    """From the 200 of each coming to the request of the next going."""
    spans = [(came.known_s, goes.asked_s) for came, goes in _stays(changes)]
    return [(start, end) for start, end in spans if start < end]


def maybe_there(changes: Iterable[Change]) -> list[Span]:
    """From the request of each coming to the 200 of the next going."""
    merged: list[Span] = []
    for came, goes in _stays(changes):
        if merged and came.asked_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], goes.known_s))
        else:
            merged.append((came.asked_s, goes.known_s))
    return merged


def ghosts(shown: Sequence[Span], changes: Sequence[Change], seen: Sequence[Span]) -> list[Span]:
    """When a client shows somebody who is gone; ``seen`` is when the client is open."""
    return intersect(subtract(shown, maybe_there(changes)), seen)


def missing(shown: Sequence[Span], changes: Sequence[Change], seen: Sequence[Span]) -> list[Span]:
    """When a client lacks somebody who is there."""
    return intersect(subtract(surely_there(changes), shown), seen)
