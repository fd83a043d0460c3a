"""What the module costs others when much goes wrong, or when somebody makes it so (H1 to H4).

``python -m benchmarks.harm --runs 3 --cases questions --keep harm.json --plot harm.svg``

A case is added as a module in ``benchmarks/harm_cases`` with a tuple ``CASES``. Each is measured at
a size and at four times that size; for a plot, at twice that size as well. The table has the
figures of the larger size, and by how much they grew. All cases take 40 minutes. With ``--keep``
some can be measured anew, and the table and the plot have the others as they were found before.
"""

import argparse
import importlib
import json
import pkgutil
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import attr

from tests.lab import Lab
from tests.lab.say import say

FACTOR = 4
_SIZES = (1, FACTOR)
_SIZES_IN_PLOT = (1, 2, FACTOR)
_COLUMNS_IN_PLOT = 4

Figures = Mapping[str, float]
"""The figures of one run, by their names."""


@attr.s(auto_attribs=True, frozen=True)
class Goal:
    """What a figure may be.

    most: at the larger size.
    growth: from the smaller size to the larger one; None if it does not matter.
    unit: of the figure; empty for a count.
    """

    most: float
    growth: float | None = None
    unit: str = ""


@attr.s(auto_attribs=True, frozen=True)
class Case:
    """Something that may do harm.

    measure: makes it happen at a size (1 or ``FACTOR``), with servers of its own.
    """

    name: str
    measure: Callable[[Lab, int], Figures]
    goals: Mapping[str, Goal]


@attr.s(auto_attribs=True, frozen=True)
class Row:
    """One figure of a case: the median of its runs by size."""

    case: str
    figure: str
    goal: Goal
    found: Mapping[int, float]

    @property
    def large(self) -> float:
        return self.found[FACTOR]

    @property
    def growth(self) -> float | None:
        return self.large / self.found[1] if self.found[1] else None

    @property
    def is_met(self) -> bool:
        grew = self.goal.growth is not None and (self.growth or 0) > self.goal.growth
        return self.large <= self.goal.most and not grew

    def cells(self) -> list[str]:
        """As the table has it."""
        growth = "-" if self.growth is None else f"{self.growth:.1f}"
        if self.goal.growth is not None:
            growth += f" (at most {self.goal.growth:g})"
        unit = f" {self.goal.unit}" if self.goal.unit else ""
        return [
            self.case,
            self.figure,
            f"{self.large:.3g}{unit}",
            f"at most {self.goal.most:g}{unit}",
            growth,
            "met" if self.is_met else "missed",
        ]


HEADINGS = ["case", "figure", "found", "goal", f"growth, size x {FACTOR}", ""]


def cases() -> list[Case]:
    """All of them."""
    from benchmarks import harm_cases

    found: list[Case] = []
    for module in pkgutil.iter_modules(harm_cases.__path__, f"{harm_cases.__name__}."):
        found += importlib.import_module(module.name).CASES
    return found


def measure(case: Case, runs: int, sizes: Sequence[int] = _SIZES) -> list[Row]:
    """The medians of so many runs, each with new servers."""
    figures: dict[int, list[Figures]] = {size: [] for size in sizes}
    for run in range(runs):
        for size, found in figures.items():
            say(f"{case.name}, size {size}, run {run + 1} of {runs}")
            with Lab() as lab:
                found.append(case.measure(lab, size))
    return [
        Row(
            case.name,
            name,
            goal,
            {
                size: statistics.median(found[name] for found in of_size)
                for size, of_size in figures.items()
            },
        )
        for name, goal in case.goals.items()
    ]


def keep(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Keeps these in a JSON file, in place of those of the same cases.

    Gives all that the file has now of today's cases, in their order.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    if path.exists():
        found = json.loads(path.read_text())
    for case in {row.case for row in rows}:
        found[case] = {}
    for row in rows:
        found[row.case][row.figure] = {str(size): figure for size, figure in row.found.items()}
    path.write_text(json.dumps(found, indent=1))
    return [
        Row(case.name, name, goal, {int(size): figure for size, figure in of_figure.items()})
        for case in cases()
        for name, goal in case.goals.items()
        if (of_figure := found.get(case.name, {}).get(name)) is not None
    ]


def table(rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Each figure against the size of what was done, with its goal."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "the same names in every drawing"
    rcParams["svg.fonttype"] = "none"  # letters as text take a tenth of the bytes
    lines = -(-len(rows) // _COLUMNS_IN_PLOT)
    figure = Figure(figsize=(3 * _COLUMNS_IN_PLOT, 2.3 * lines), layout="constrained")
    all_axes = list(figure.subplots(lines, _COLUMNS_IN_PLOT, squeeze=False).flat)
    for axes in all_axes:
        axes.set_axis_off()
    for row, axes in zip(rows, all_axes, strict=False):
        axes.set_axis_on()
        sizes = sorted(row.found)
        axes.plot(sizes, [row.found[size] for size in sizes], marker="o", color="#2a8c4a")
        axes.axhline(row.goal.most, linestyle="--", color="#d9822b")
        axes.set_ylim(bottom=0)
        axes.set_xticks(sizes, [f"x {size}" for size in sizes])
        unit = f" ({row.goal.unit})" if row.goal.unit else ""
        axes.set_title(textwrap.fill(row.case, 48) + f"\n{row.figure}{unit}", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Prints the table; exits with an error if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", default="", help="those with this in their name only")
    parser.add_argument("--keep", type=Path, help="a JSON file with the figures found before")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw (needs matplotlib)")
    args = parser.parse_args()
    sizes = _SIZES_IN_PLOT if args.plot else _SIZES
    rows = [
        row
        for case in cases()
        if args.cases.lower() in case.name.lower()
        for row in measure(case, args.runs, sizes)
    ]
    if args.keep:
        rows = keep(args.keep, rows)
    say(table([row.cells() for row in rows]))
    if args.plot:
        draw(rows, args.plot)
    if not all(row.is_met for row in rows):
        sys.exit("A goal is missed.")


if __name__ == "__main__":
    main()
