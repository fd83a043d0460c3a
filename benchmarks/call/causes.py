"""Why somebody is shown wrongly: what goes on at that time, and what the machine itself costs.

Pure: nothing here waits or asks.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import attr

from benchmarks.call.spans import Change, Span, ghosts, missing

AFTERWARDS_S = 10.0
"""What goes wrong for so long after a trouble has ended is still due to it."""
ORDINARY = "ordinary"
APART = ("newcomer", "denied", "absent", "restart")
"""Troubles that keep servers apart: until they end, and for ``AFTERWARDS_S`` after, nobody can tell
the one what happens at the other. What is wrong meanwhile is in rows of their own."""
PRIORITY = (*APART, *("app restarted", "ban", "crash", "gateway", "flapper", "flood"))
"""Which of several troubles explains a wrong span."""
SHORT_S = 2.0
_NEAR_S = 2.0
_LEAST_NEAR = 4


@attr.s(auto_attribs=True, frozen=True)
class Party:
    """Who observes, or who is observed; ``server`` is its homeserver's letter."""

    name: str
    server: str
    room: str = ""


@attr.s(auto_attribs=True, frozen=True)
class Trouble:
    """Something in the story that makes clients show what is wrong.

    concerns: whether it concerns what this observer shows of this participant.
    """

    cause: str
    start_s: float
    end_s: float
    concerns: Callable[[Party, Party], bool]

    def explains(self, wrong: "Wrong") -> bool:
        """Is the wrong span due to it?"""
        is_then = wrong.start_s < self.end_s + AFTERWARDS_S and wrong.end_s > self.start_s
        return is_then and self.concerns(wrong.observer, wrong.participant)


@attr.s(auto_attribs=True, frozen=True)
class Wrong:
    """A span in which an observer shows somebody who is gone, or lacks somebody who is there."""

    observer: Party
    participant: Party
    is_ghost: bool
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def is_remote(self) -> bool:
        return self.observer.server != self.participant.server


def wrong_spans(
    observer: Party,
    participant: Party,
    shown: Sequence[Span],
    changes: Sequence[Change],
    seen: Sequence[Span],
) -> list[Wrong]:
    """All that this observer shows wrongly of this participant, by time."""
    found = [
        Wrong(observer, participant, is_ghost, start, end)
        for is_ghost, which in ((True, ghosts), (False, missing))
        for start, end in which(shown, changes, seen)
    ]
    return sorted(found, key=lambda w: w.start_s)


def cause_of(wrong: Wrong, troubles: Iterable[Trouble]) -> str:
    """The trouble that explains it, of several the first of ``PRIORITY``."""
    explain = {t.cause for t in troubles if t.explains(wrong)}
    return next((cause for cause in PRIORITY if cause in explain), ORDINARY)


@attr.s(auto_attribs=True, frozen=True)
class Delay:
    """How long a change of the control took to reach an observer."""

    at_s: float
    is_remote: bool
    seconds: float


def delays(
    observer: Party, participant: Party, changes: Sequence[Change], wrong: Sequence[Wrong]
) -> list[Delay]:
    """How long each change took: the wrong seconds up to the next change."""
    ends = [*(change.asked_s for change in changes[1:]), float("inf")]
    is_remote = observer.server != participant.server
    return [
        Delay(
            change.known_s,
            is_remote,
            sum(w.seconds for w in wrong if change.asked_s <= w.start_s < end),
        )
        for change, end in zip(changes, ends, strict=True)
    ]


class Machine:
    """What the machine itself costs, by how long the control's changes took around that time."""

    def __init__(self, control: Iterable[Delay]) -> None:
        self._delays: dict[bool, list[Delay]] = defaultdict(list)
        for delay in control:
            self._delays[delay.is_remote].append(delay)

    def cost_s(self, at_s: float, *, is_remote: bool) -> float:
        """The mean of those near, or of all if few are near."""
        of_kind = self._delays[is_remote]
        near = [d.seconds for d in of_kind if abs(d.at_s - at_s) <= _NEAR_S]
        if len(near) < _LEAST_NEAR:
            return self.mean_s(is_remote=is_remote)
        return statistics.fmean(near)

    def mean_s(self, *, is_remote: bool) -> float:
        """The mean of all."""
        of_kind = [d.seconds for d in self._delays[is_remote]]
        return statistics.fmean(of_kind) if of_kind else 0.0

    def rest_of(self, wrong: Wrong) -> float:
        """The seconds of a wrong span that the machine does not explain."""
        return max(wrong.seconds - self.cost_s(wrong.start_s, is_remote=wrong.is_remote), 0.0)


@attr.s(auto_attribs=True)
class Sum:
    """The wrong seconds of one cause, without what the machine costs."""

    ghost_s: float = 0.0
    missing_s: float = 0.0
    spans: list[float] = attr.Factory(list)

    def add(self, seconds: float, *, is_ghost: bool) -> None:
        if is_ghost:
            self.ghost_s += seconds
        else:
            self.missing_s += seconds
        if seconds:
            self.spans.append(seconds)

    @property
    def total_s(self) -> float:
        return self.ghost_s + self.missing_s

    @property
    def share_short(self) -> float:
        """How many of the spans are under ``SHORT_S``, from 0 to 1."""
        return statistics.fmean(s < SHORT_S for s in self.spans) if self.spans else 1.0

    @property
    def longest_s(self) -> float:
        return max(self.spans, default=0.0)


def meanwhile(cause: str) -> str:
    """The row of what is wrong while servers are apart."""
    return f"{cause}, until {AFTERWARDS_S:g} s after"


def by_row(wrong: Wrong, troubles: Sequence[Trouble]) -> list[tuple[str, Wrong]]:
    """The row that the wrong span belongs to; two if it outlasts what keeps servers apart."""
    cause = cause_of(wrong, troubles)
    if cause not in APART:
        return [(cause, wrong)]
    end_s = AFTERWARDS_S + max(t.end_s for t in troubles if t.cause == cause and t.explains(wrong))
    if wrong.end_s <= end_s:
        return [(meanwhile(cause), wrong)]
    return [
        (meanwhile(cause), attr.evolve(wrong, end_s=end_s)),
        (cause, attr.evolve(wrong, start_s=end_s)),
    ]


def sums(wrong: Iterable[Wrong], troubles: Sequence[Trouble], machine: Machine) -> dict[str, Sum]:
    """By row."""
    found: dict[str, Sum] = defaultdict(Sum)
    for one in wrong:
        for row, part in by_row(one, troubles):
            found[row].add(machine.rest_of(part), is_ghost=one.is_ghost)
    return dict(found)
