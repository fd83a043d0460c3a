"""What the module costs others when much goes wrong, or when somebody makes it so (H1 to H4).

``python -m benchmarks.harm --runs 3 --cases questions``

A case is added as a module in ``benchmarks/harm_cases`` with a tuple ``CASES``. Each is measured at
a size and at four times that size. The table has the figures of the larger size, and by how much
they grew.
"""

import argparse
import importlib
import pkgutil
import statistics
import sys
from collections.abc import Callable, Mapping

import attr

from tests.lab import Lab
from tests.lab.say import say

FACTOR = 4

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
    """One figure of a case: the median of its runs at both sizes."""

    case: str
    figure: str
    goal: Goal
    small: float
    large: float

    @property
    def growth(self) -> float | None:
        return self.large / self.small if self.small else None

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


def measure(case: Case, runs: int) -> list[Row]:
    """The medians of so many runs, each with new servers."""
    figures: dict[int, list[Figures]] = {1: [], FACTOR: []}
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
            statistics.median(found[name] for found in figures[1]),
            statistics.median(found[name] for found in figures[FACTOR]),
        )
        for name, goal in case.goals.items()
    ]


def table(rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints the table; exits with an error if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", default="", help="those with this in their name only")
    args = parser.parse_args()
    rows = [
        row
        for case in cases()
        if args.cases.lower() in case.name.lower()
        for row in measure(case, args.runs)
    ]
    say(table([row.cells() for row in rows]))
    if not all(row.is_met for row in rows):
        sys.exit("A goal is missed.")


if __name__ == "__main__":
    main()
