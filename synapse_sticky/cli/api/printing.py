"""How answers of the API are printed. Strangers choose much of what is in them."""

import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime

from synapse_sticky.cli.texts import printable


def say(text: str) -> None:
    """Prints a line, as it is but for what a terminal obeys."""
    from rich.console import Console

    Console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def show_rows(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table; an empty cell for each None. Nothing is cut off: IDs are copied from there.

    Args:
        titles: of the columns. The first has the ID, which is not broken if there is room.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    columns = [Column(title, overflow="fold") for title in titles]
    columns[0].no_wrap = True
    table = Table(*columns)
    for row in rows:
        cells = ("" if cell is None else str(cell) for cell in row)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    Console().print(table)


def show_next(answer: dict[str, object]) -> None:
    """Says how to go on, if there is more."""
    if (after := answer.get("next")) is not None:
        # It is copied into a shell.
        say(f"There is more. Go on with --from {shlex.quote(printable(str(after)))}")


def time_of(at_ms: int | None) -> str:
    """A time in ms since the epoch, in the time of this machine."""
    return "" if at_ms is None else f"{datetime.fromtimestamp(at_ms / 1000):%Y-%m-%d %H:%M:%S}"
