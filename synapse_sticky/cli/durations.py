"""Durations on the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

_WEEK_MS = 7 * 86_400_000


def duration_of(ctx: "click.Context", param: "click.Parameter", value: str) -> int:
    """A duration in ms, from ``30s`` and the like, as in the configuration but for a bare number.

    Raises:
        click.BadParameter: it is none, or more than a week.
    """
    import click

    from synapse_sticky.options import duration

    try:
        if value.isdecimal():
            # In a configuration these are ms, which nobody would guess here.
            raise ValueError("a number with a unit, such as 30s, 5m or 1h")
        checked: int = duration(1, _WEEK_MS)(value)
    except ValueError as e:
        raise click.BadParameter(f"must be {e}") from None
    return checked
