"""The command ``status``: how much is sticky, and how much waits."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.api.options import asking
from synapse_sticky.cli.texts import printable

if TYPE_CHECKING:
    import click
    from rich.table import Table

    from synapse_sticky.cli.api.client import Client

_HELP = """
Shows how many events of the running homeserver are sticky, and how many wait for what.
"""
_EXAMPLES = (
    "synapse-sticky status --token-file admin.token",
    "synapse-sticky status --url http://localhost:8083 --json",
)


def command() -> "click.Command":
    """The command, for click."""
    return asking("status", _HELP, _EXAMPLES, _ask, _show)


def _ask(client: "Client") -> Any:
    return client.get("overview")


def _show(overview: Any) -> None:
    from rich.console import Console

    Console().print(table_of(overview))


def table_of(overview: Any) -> "Table":
    """For people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "now", title=escape(printable(overview["server_name"])), title_justify="left")
    for name, value in _rows(overview):
        table.add_row(escape(name), escape(printable(value)))
    return table


def _rows(overview: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    most = overview["counted_up_to"]

    def count(value: int) -> str:
        return f"{most} or more" if value >= most else str(value)

    def age(since_ms: int | None) -> str:
        return "-" if since_ms is None else f"{(overview['now_ms'] - since_ms) / 1000:.0f} s"

    active, staged, backlog = (overview[name] for name in ("active", "staged", "backlog"))
    yield "federation.mode", overview["limits"]["mode"]
    yield "sticky events", f"{count(active['events'])} in {count(active['rooms'])} rooms"
    yield "staged PDUs", f"{count(staged['pdus'])} in {count(staged['rooms'])} rooms"
    yield "  the oldest, for", age(staged["oldest_ms"])
    for name, key, counts in (
        ("deferred events", "events", "by_limit"),
        ("parked PDUs", "pdus", "by_reason"),
    ):
        waiting = overview[name.split()[0]]
        if waiting is None:
            yield name, "not known, as the duty has no table"
            continue
        yield name, count(waiting[key])
        for why, number in waiting[counts].items():
            yield f"  {printable(why)}", count(number)
    newcomers = overview["newcomers"]
    if newcomers is None:
        yield "newcomers that may lack events", "not known, as the duty has no table"
    else:
        yield "newcomers that may lack events", count(newcomers["open"])
        yield "  the oldest, since", age(newcomers["oldest_open_ms"])
    lacking = f"{count(backlog['servers'])}, of {count(backlog['rooms_of_servers'])} rooms"
    yield "servers that lack events", lacking
