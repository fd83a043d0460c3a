"""What the observers showed wrongly in a call, as a table and as a plot."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attr

from benchmarks.call.causes import (
    APART,
    ORDINARY,
    PRIORITY,
    SHORT_S,
    Machine,
    Sum,
    Wrong,
    cause_of,
    delays,
    meanwhile,
    sums,
    wrong_spans,
)
from benchmarks.call.observers import Observer
from benchmarks.call.people import Participant
from benchmarks.call.schedule import A, B
from benchmarks.call.spans import Span, surely_there
from benchmarks.call.story import Call
from tests.lab.say import say

LONGEST_S = 5.0
SHARE_SHORT = 0.99
SHARE_OF_PLAIN = 1 / 50
WORSE_S = 5.0
"""A cause for which the module has so much more than plain Synapse is worse than there."""
_NOT_THE_MACHINE = ("absent", "restart", "app restarted")
"""Troubles of whole servers or clients, in which the control does not show the machine alone."""
_MEANWHILE = tuple(meanwhile(cause) for cause in APART)
COLOURS = ("#2f6db5", "#8cb4e0", "#2a8c4a", "#8cc49c", "#d9822b", "#eec08f")


@attr.s(auto_attribs=True, frozen=True)
class Result:
    """Of one call: the sums by cause, without what the machine costs; and what was not taken off.

    seen: how many participants each observer shows, by time in seconds of the call.
    truth: how many there are.
    """

    by_cause: dict[str, Sum]
    wrong: list[Wrong]
    raw_ghost_s: float
    raw_missing_s: float
    machine_s: dict[bool, float]
    cpu_s: dict[str, float]
    seconds: float
    seen: dict[str, list[tuple[float, int]]]
    truth: list[tuple[float, int]]

    @property
    def total(self) -> Sum:
        """Without what is wrong while servers are apart, or have just met."""
        total = Sum()
        for row, one in self.by_cause.items():
            if row in _MEANWHILE:
                continue
            total.ghost_s += one.ghost_s
            total.missing_s += one.missing_s
            total.spans += one.spans
        return total


def _wrong(call: Call, observer: Observer, participants: Sequence[Participant]) -> list[Wrong]:
    shown = observer.shown((p.key for p in participants), call.end_s)
    seen = observer.seen(call.end_s)
    return [
        wrong
        for p in participants
        for wrong in wrong_spans(observer.party, p.party, shown[p.key], p.changes, seen)
    ]


def _machine(call: Call) -> Machine:
    apart = [t for t in call.troubles if t.cause in _NOT_THE_MACHINE]
    found = []
    for observer in call.observers:
        if observer.party.server not in (A, B):
            continue
        for control in call.controls:
            if not observer.watches(control.party.room):
                continue
            wrong = _wrong(call, observer, [control])
            found += [
                delay
                for delay in delays(observer.party, control.party, control.changes, wrong)
                if not any(
                    t.explains(Wrong(observer.party, control.party, False, delay.at_s, delay.at_s))
                    for t in apart
                )
            ]
    return Machine(found)


def steps(spans: Sequence[Span], start_s: float) -> list[tuple[float, int]]:
    """How many of the spans there are at each time at which this changes, from 0 on."""
    edges = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    found, count = [(0.0, 0)], 0
    for at_s, by in edges:
        count += by
        found.append((at_s - start_s, count))
    return found


def look_at(call: Call) -> Result:
    """Sums it up."""
    machine = _machine(call)
    wrong = [w for o in call.observers for w in _wrong(call, o, call.participants)]
    keys = [p.key for p in call.participants]
    seen = {}
    for observer in call.observers:
        spans = [s for found in observer.shown(keys, call.end_s).values() for s in found]
        seen[observer.party.name] = steps(spans, call.start_s)
    truth = [
        (start, min(end, call.end_s))
        for p in call.participants
        for start, end in surely_there(p.changes)
    ]
    return Result(
        sums(wrong, call.troubles, machine),
        wrong,
        sum(w.seconds for w in wrong if w.is_ghost),
        sum(w.seconds for w in wrong if not w.is_ghost),
        {is_remote: machine.mean_s(is_remote=is_remote) for is_remote in (False, True)},
        call.cpu_s,
        call.end_s - call.start_s,
        seen,
        steps(truth, call.start_s),
    )


def say_table(results: Mapping[str, Result]) -> None:
    """A row for each cause, in Markdown."""
    titles = [
        f"{name}: {what}"
        for name in results
        for what in ("ghost s", "missing s", "spans", "under 2 s", "longest")
    ]
    say("| cause | " + " | ".join(titles) + " |")
    say("|---" * (len(titles) + 1) + "|")
    for cause in (*_MEANWHILE, *PRIORITY, ORDINARY):
        if any(cause in result.by_cause for result in results.values()):
            row = [_cells(result.by_cause.get(cause, Sum())) for result in results.values()]
            say(f"| {cause} | " + " | ".join(row) + " |")
    say("| **sum** | " + " | ".join(_cells(r.total) for r in results.values()) + " |")
    for name, result in results.items():
        spent = ", ".join(f"{name} {cpu_s:.0f}" for name, cpu_s in result.cpu_s.items())
        own_s, other_s = (result.machine_s[is_remote] for is_remote in (False, True))
        say(
            f"{name}: the machine cost {own_s:.2f} s a change at the same server and"
            f" {other_s:.2f} s at another; with that there were {result.raw_ghost_s:.0f} ghost"
            f" seconds and {result.raw_missing_s:.0f} missing ones; in {result.seconds:.0f} s the"
            f" servers used {spent} s of CPU"
        )


def missed_goals(module: Result, plain: Result) -> list[str]:
    """What the module did not reach in a call, in words."""
    found = []
    total, plain_s = module.total, plain.total.total_s
    if total.total_s > plain_s * SHARE_OF_PLAIN:
        found.append(
            f"{total.total_s:.1f} ghost and missing seconds are more than"
            f" {SHARE_OF_PLAIN:.0%} of plain Synapse's {plain_s:.1f}"
        )
    for cause in (*PRIORITY, ORDINARY):
        here_s, there_s = (r.by_cause.get(cause, Sum()).total_s for r in (module, plain))
        if here_s > there_s + WORSE_S:
            found.append(f"{cause}: {here_s:.1f} s, plain Synapse {there_s:.1f} s")
    if total.share_short < SHARE_SHORT:
        found.append(f"only {total.share_short:.1%} of the spans are under {SHORT_S:g} s")
    if total.longest_s > LONGEST_S:
        found.append(f"the longest span is {total.longest_s:.1f} s, above {LONGEST_S:g} s")
    return found


def say_longest(call: Call, result: Result, most: int) -> None:
    """The longest wrong spans of each cause, for whoever looks for what is behind them."""
    told: Counter[str] = Counter()
    for wrong in sorted(result.wrong, key=lambda w: -w.seconds):
        cause = cause_of(wrong, call.troubles)
        told[cause] += 1
        if told[cause] > most:
            continue
        say(
            f"{cause}: {wrong.observer.name} of {wrong.participant.name}"
            f" ({wrong.participant.server}) {'ghost' if wrong.is_ghost else 'missing'} from"
            f" {wrong.start_s - call.start_s:.1f} s for {wrong.seconds:.2f} s"
        )


def _cells(one: Sum) -> str:
    return (
        f"{one.ghost_s:.1f} | {one.missing_s:.1f} | {len(one.spans)} | {one.share_short:.0%} |"
        f" {one.longest_s:.1f} s"
    )


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Participants over time, as each observer sees them."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "the same names in every drawing"
    figure = Figure(figsize=(8, 3.2 * len(results)), layout="constrained")
    rows: Any = figure.subplots(len(results), 1, sharex=True, sharey=True, squeeze=False)
    for (axes,), (name, result) in zip(rows, results.items(), strict=True):
        for (observer, counts), colour in zip(result.seen.items(), COLOURS * 9, strict=False):
            axes.step(*zip(*counts, strict=True), where="post", color=colour, label=observer, lw=1)
        axes.step(
            *zip(*result.truth, strict=True), where="post", color="black", label="truth", lw=1
        )
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("participants")
        axes.grid(visible=True, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1][0].set_xlabel("seconds of the call")
    rows[0][0].legend(fontsize=7, ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})
