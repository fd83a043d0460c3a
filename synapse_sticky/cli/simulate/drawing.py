"""What came of a simulation, for people: tables and curves in the terminal, and a picture."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from synapse_sticky.cli.simulate.outcome import Fate, Outcome, Played, Sums
from synapse_sticky.cli.texts import printable

if TYPE_CHECKING:
    from rich.console import Console

_POINTS = 400
_HEIGHT = 16
_MARKERS = "·ox"
_UNITS = ((3_600_000, "h"), (60_000, "min"), (1_000, "s"))


def time_of(ms: int) -> str:
    """``1.5 min``."""
    for unit_ms, name in _UNITS:
        if ms >= unit_ms:
            return f"{ms / unit_ms:.1f} {name}"
    return f"{ms} ms"


def show(console: "Console", outcomes: Mapping[str, Outcome]) -> None:
    """Prints tables and curves.

    Args:
        outcomes: by what the configurations are called.
    """
    from rich.table import Table

    sums = {name: outcome.sums() for name, outcome in outcomes.items()}
    table = Table("", *outcomes)
    rows = [
        ("events", [str(one.events) for one in sums.values()]),
        *(
            (title, [str(one.by_fate.get(fate.value, 0)) for one in sums.values()])
            for fate, title in _TITLES.items()
        ),
        ("past a limit", [_limits(one) for one in sums.values()]),
        ("delay: median", [time_of(one.median_ms) for one in sums.values()]),
        ("delay: 95 of 100 within", [time_of(one.p95_ms) for one in sums.values()]),
        ("delay: longest", [time_of(one.longest_ms) for one in sums.values()]),
        ("most that wait at once", [str(one.most_waiting()) for one in outcomes.values()]),
        ("last delivered after", [time_of(one.last_ms()) for one in outcomes.values()]),
    ]
    for title, cells in rows:
        table.add_row(title, *cells)
    console.print(table)
    for name, outcome in outcomes.items():
        console.print(_servers(name, outcome.by_server()))
    console.out(_curves(outcomes, console.width), highlight=False)


_TITLES = {
    Fate.NOW: "delivered at once",
    Fate.LATER: "delivered later",
    Fate.EXPIRED: "expired before their turn",
    Fate.REFUSED: "refused (429), sent again later",
}


def _limits(sums: Sums) -> str:
    return "\n".join(f"{limit}: {count}" for limit, count in sums.by_limit.items()) or "none"


def _servers(name: str, by_server: Mapping[str, Sums]) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        *("server", "events", "at once", "median delay", "longest delay"),
        title=f"By server, with {escape(name)}",
        title_justify="left",
    )
    for server, sums in by_server.items():
        now = sums.by_fate.get(Fate.NOW.value, 0)
        delays = (time_of(sums.median_ms), time_of(sums.longest_ms))
        table.add_row(escape(printable(server)), str(sums.events), str(now), *delays)
    return table


def _curves(outcomes: Mapping[str, Outcome], width: int) -> str:
    """How many events were delivered up to when."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(min(width, 100), _HEIGHT)
    plotext.title("Events that clients have, after so many seconds")
    for (name, (times, counts)), marker in zip(_series(outcomes).items(), _MARKERS, strict=False):
        plotext.plot(times, counts, label=printable(name), marker=marker)
    return str(plotext.uncolorize(plotext.build()))


def _series(outcomes: Mapping[str, Outcome]) -> dict[str, tuple[list[float], list[int]]]:
    """By name: times in s since the first arrival, and how many events there are by then."""
    (first, *_) = outcomes.values()
    end_ms = max(1_000, *(outcome.last_ms() for outcome in outcomes.values()))
    steps_ms = [end_ms * step // _POINTS for step in range(_POINTS + 1)]
    arrived = sorted(p.arrival.at_ms - first.begin_ms for p in first.events.values())
    times_of = {"arrived": arrived}
    for name, outcome in outcomes.items():
        times_of[name] = sorted(
            p.delivered_ms - outcome.begin_ms
            for p in outcome.events.values()
            if p.delivered_ms is not None
        )
    seconds = [step / 1000 for step in steps_ms]
    return {
        name: (seconds, [bisect_right(times, step) for step in steps_ms])
        for name, times in times_of.items()
    }


def draw(path: str, outcomes: Mapping[str, Outcome]) -> None:
    """Writes an SVG: how many events clients have when, and how long each event waited.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same picture has the same bytes.
    with mpl.rc_context({"svg.hashsalt": "synapse-sticky"}):
        figure = Figure(figsize=(9, 7), layout="constrained")
        above, below = figure.subplots(2, 1)
        for name, (times, counts) in _series(outcomes).items():
            above.plot(times, counts, label=name, drawstyle="steps-post")
        above.set_xlabel("s after the first arrival")
        above.set_ylabel("events that clients have")
        above.legend()
        for number, (name, outcome) in enumerate(outcomes.items(), 1):
            delivered = [p for p in outcome.events.values() if p.delivered_ms is not None]
            times, delays = _delays(delivered, outcome.begin_ms)
            # The color of its curve above, where the first is of the arrivals.
            below.plot(times, delays, ".", color=f"C{number}", markersize=3, label=name)
        below.set_ylabel("s until clients have an event")
        below.set_xlabel("s after the first arrival, when the event arrived")
        below.legend()
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.set_ylim(bottom=0)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _delays(delivered: Sequence[Played], begin_ms: int) -> tuple[list[float], list[float]]:
    return (
        [(played.arrival.at_ms - begin_ms) / 1000 for played in delivered],
        [played.delay_ms / 1000 for played in delivered],
    )
