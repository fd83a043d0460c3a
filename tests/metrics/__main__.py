"""Draws docs/metrics.svg: the dashboard's queries on a live lab, as Prometheus answers them."""

import io
import math
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.lab import Lab, starter, wait_until
from tests.lab.say import say
from tests.metrics import prometheus, story
from tests.metrics.prometheus import ROOT, Prometheus
from tests.metrics.queries import Panel, filled_in, panels

PATH = ROOT / "docs/metrics.svg"

_COLUMNS = 3
_STEPS = 60
_LEGEND_ROWS = 8
_UNITS = {"hertz": "a second", "s": "seconds", "short": ""}


def main() -> None:
    """Tells the story, and draws it."""
    if not prometheus.is_here():
        raise SystemExit(prometheus.MISSING)
    with starter.forking(), Lab() as lab, tempfile.TemporaryDirectory() as folder:
        servers, peer = story.servers(lab), lab.peer()
        try:
            ports = [server.metrics_port for server in servers]
            with prometheus.running(Path(folder), ports) as running:
                began_s = time.time()
                say("The story is told.")
                story.Story(lab, *servers, peer).tell()
                # The panic is the last of it.
                seen = "sum(rate(synapse_sticky_panics_total[1m])) > 0"
                wait_until(lambda: running.query(seen), "Prometheus to see the end of it")
                took_s = time.time() - began_s
                draw(running, [server.name for server in servers], began_s, began_s + took_s)
                for server in servers:
                    say(f"{len(story.lines(server))} lines of the log within {took_s:.0f} s")
        finally:
            peer.close()
    say(f"Drew {PATH.relative_to(ROOT)}")


def draw(running: Prometheus, server_names: list[str], began_s: float, ended_s: float) -> None:
    """All panels over this time, in seconds since the epoch: each of the first of the homeservers
    where something in it moves."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # The same file for the same figures, with text as text.
    mpl.rcParams.update({"svg.hashsalt": "metrics", "svg.fonttype": "none"})
    mpl.rcParams.update({"font.size": 7, "font.sans-serif": ["DejaVu Sans"]})
    drawn = panels()
    rows = math.ceil(len(drawn) / _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(12, 2.1 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        of_servers = (_series(panel, running, name, began_s, ended_s) for name in server_names)
        _draw_panel(axis, panel, next(filter(None, of_servers), {}), ended_s - began_s)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Drawn by matplotlib, not by Grafana: the dashboard's queries, as Prometheus answers them"
        " on the test lab",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    drawing = io.StringIO()
    figure.savefig(drawing, metadata={"Date": None})
    # A hundredth of a point is enough for a place. Text, which ends before a tag, stays as it is.
    PATH.write_text(re.sub(r"(\d\.\d\d)\d+(?=[\s\")])", r"\1", drawing.getvalue()))


def _series(
    panel: Panel, running: Prometheus, server_name: str, began_s: float, ended_s: float
) -> dict[str, list[tuple[float, float]]]:
    """What of the panel is not 0 all the time, by its legend: when, in seconds since the beginning,
    and how much."""
    step_s = max((ended_s - began_s) / _STEPS, 1)
    found = {}
    for query, legend in panel.queries:
        asked = filled_in(query, server_name)
        for labels, points in running.over_time(asked, began_s, ended_s, step_s):
            name = legend
            for label, value in labels.items():
                name = name.replace(f"{{{{{label}}}}}", value)
            if any(value for _, value in points if not math.isnan(value)):
                found[name] = [(at_s - began_s, value) for at_s, value in points]
    return found


def _draw_panel(
    axis: Any, panel: Panel, series: dict[str, list[tuple[float, float]]], took_s: float
) -> None:
    for name, points in (series or {"0": [(0.0, 0.0), (took_s, 0.0)]}).items():
        axis.plot(*zip(*points, strict=True), linewidth=1, label=name)
    axis.set_title(panel.title, fontsize=8)
    axis.set_ylabel(_UNITS[panel.unit])
    axis.set_xlim(0, took_s)
    axis.set_ylim(bottom=0, top=None if series else 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.locator_params(nbins=4)
    axis.grid(visible=True, axis="y", color="#eeeeee")
    columns = max(math.ceil(len(series) / _LEGEND_ROWS), 1)
    # Beside a long legend the lines have the lower half.
    axis.set_ylim(top=axis.get_ylim()[1] * (2 if columns > 1 else 1))
    axis.legend(fontsize=5, loc="upper left", frameon=False, ncols=columns)


if __name__ == "__main__":
    main()
