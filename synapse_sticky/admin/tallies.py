"""Lists of rooms or servers, each with how much there is of it: paged, sorted (E3)."""

from collections.abc import Mapping, Sequence
from typing import Any

import attr

from synapse_sticky.admin.overview import MOST_COUNTED
from synapse_sticky.admin.requests import Request, wrong
from synapse_sticky.homeserver import Cursor

Source = tuple[str, Sequence[Any]]
"""SQL that gives one column named ``name``, a row for each thing that is counted; and its
arguments."""


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Page:
    """Which entries are asked for, and in which order.

    order_by: what is counted, or ``name``.
    after: the number and the name of the last entry of the page before.
    """

    order_by: str
    is_ascending: bool
    limit: int
    after: tuple[int, str] | None = None

    @classmethod
    def of(cls, request: Request, counted: Sequence[str]) -> "Page":
        """By the parameters ``order_by``, ``dir``, ``from`` and ``limit``.

        Raises:
            SynapseError: 400, if one is not as it must be.
        """
        order_by = request.choice("order_by", [*counted, "name"], counted[0])
        direction = request.choice("dir", ["f", "b"], "f" if order_by == "name" else "b")
        after = None
        if (token := request.token()) is not None:
            number, tilde, name = token.partition("~")
            if not tilde or not (number.isascii() and number.isdecimal() and len(number) <= 9):
                raise wrong("'from' must be the 'next' of an answer")
            after = int(number), name
        return cls(order_by, direction == "f", request.limit(), after)


def tally_txn(
    txn: Cursor, sources: Mapping[str, Source], page: Page
) -> tuple[list[dict[str, Any]], str | None]:
    """The entries of the page, each with its ``name`` and its number of each source, and where the
    next page begins.

    It reads all rows of the sources, at most 100,000 of each.
    """
    columns = list(sources)
    parts, args = [], list[Any]()
    for number, (column, (sql, its_args)) in enumerate(sources.items()):
        ones = ", ".join(f"{int(column == other)} AS n{n}" for n, other in enumerate(columns))
        parts.append(f"SELECT name, {ones} FROM ({sql} LIMIT ?) AS source{number}")
        args += [*its_args, MOST_COUNTED]
    sums = [f"SUM(n{number})" for number in range(len(columns))]
    by_name = page.order_by == "name"
    order = "name" if by_name else sums[columns.index(page.order_by)]
    sign, direction = (">", "ASC") if page.is_ascending else ("<", "DESC")
    having = ""
    if page.after is not None:
        number, name = page.after
        having = (
            f"HAVING name {sign} ?"
            if by_name
            else (f"HAVING {order} {sign} ? OR ({order} = ? AND name > ?)")
        )
        args += [name] if by_name else [number, number, name]
    then = "" if by_name else ", name"
    txn.execute(
        f"SELECT name, {', '.join(sums)} FROM ({' UNION ALL '.join(parts)}) AS counted"
        f" GROUP BY name {having} ORDER BY {order} {direction}{then} LIMIT ?",
        (*args, page.limit + 1),
    )
    rows = txn.fetchall()
    entries = [dict(zip(("name", *columns), row, strict=True)) for row in rows[: page.limit]]
    for entry in entries:
        entry.update((column, int(entry[column])) for column in columns)
    if len(rows) <= page.limit:
        return entries, None
    last = entries[-1]
    return entries, f"{0 if by_name else last[page.order_by]}~{last['name']}"
