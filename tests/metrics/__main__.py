"""Draws docs/metrics.svg: the dashboard's queries on a live lab, as Prometheus answers them."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.lab import Lab, starter
from tests.lab.say import say
from tests.metrics import prometheus, story
from tests.metrics.prometheus import ROOT, Prometheus
from tests.metrics.queries import Panel, filled_in, panels

PATH = ROOT / "docs/metrics.svg"

_COLUMNS = 3
_STEPS = 120
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
                took_s = time.time() - began_s
                draw(running, servers[0].name, began_s, began_s + took_s)
                for server in servers:
                    say(f"{len(story.lines(server))} lines of the log within {took_s:.0f} s")
        finally:
            peer.close()
    say(f"Drew {PATH.relative_to(ROOT)}")


def draw(running: Prometheus, server_name: str, began_s: float, ended_s: float) -> None:
    """All panels of one homeserver over this time, in seconds since the epoch."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # The same file for the same figures, with text as text.
    mpl.rcParams.update({"svg.hashsalt": "metrics", "svg.fonttype": "none", "font.size": 7})
    drawn = panels()
    rows = math.ceil(len(drawn) / _COLUMNS)
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(12, 2.1 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        _draw_panel(axis, panel, running, server_name, began_s, ended_s)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_visible(False)
    figure.suptitle(
        "Drawn by matplotlib, not by Grafana: the dashboard's queries, as Prometheus answers them"
        " on the test lab",
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    figure.savefig(PATH, metadata={"Date": None})


def _draw_panel(
    axis: Any,
    panel: Panel,
    running: Prometheus,
    server_name: str,
    began_s: float,
    ended_s: float,
) -> None:
    step_s = max((ended_s - began_s) / _STEPS, 1)
    for query, legend in panel.queries:
        asked = filled_in(query, server_name)
        for labels, points in running.over_time(asked, began_s, ended_s, step_s):
            name = legend
            for label, value in labels.items():
                name = name.replace(f"{{{{{label}}}}}", value)
            moves = any(value for _, value in points if not math.isnan(value))
            axis.plot(
                [at_s - began_s for at_s, _ in points],
                [value for _, value in points],
                linewidth=1,
                # What stays at 0 needs no entry.
                label=name if moves else None,
            )
    axis.set_title(panel.title, fontsize=8)
    axis.set_ylabel(_UNITS[panel.unit])
    axis.set_xlim(0, ended_s - began_s)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, color="#eeeeee")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=5, loc="upper left", frameon=False)


if __name__ == "__main__":
    main()
