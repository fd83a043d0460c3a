"""Durations on the command line."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

_WEEK_MS = 7 * 86_400_000


def duration_from(
    at_least_ms: int, shown: str
) -> "Callable[[click.Context, click.Parameter, str], int]":
    """Takes a duration as ``30s`` and the like, and gives it in ms; at most a week.

    Args:
        shown: the least, as somebody would write it.

    Returns:
        A callback of an option. It raises ``click.BadParameter``.
    """
    from synapse_sticky.options import duration

    check = duration(at_least_ms, _WEEK_MS)

    def duration_of(ctx: "click.Context", param: "click.Parameter", value: str) -> int:
        import click

        try:
            if value.isdecimal():
                # In a configuration these are ms, which nobody would guess here.
                raise ValueError
            checked: int = check(value)
        except ValueError:
            problem = f"{value!r} is no duration from {shown} to 7d, as a number with a unit (5m)"
            raise click.BadParameter(problem) from None
        return checked

    return duration_of
