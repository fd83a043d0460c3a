"""The command ``watch``: what ``status`` shows, again and again."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.api.client import AskingError
from synapse_sticky.cli.api.options import ACCESS, client_of, options_of_all
from synapse_sticky.cli.api.status import table_of
from synapse_sticky.cli.report import ALL_FIT
from synapse_sticky.cli.texts import examples, printable

if TYPE_CHECKING:
    import click

_HELP = f"""
Shows what `status` shows, and renews it until Ctrl-C. With --json it prints one JSON object a line.
A server that does not answer for a while, as it restarts, does not end this.

{ACCESS}
"""
_EXAMPLES = (
    "synapse-sticky watch --token-file admin.token",
    "synapse-sticky watch --every 60 --json --token-file admin.token >> overview.jsonl",
)


def command() -> "click.Command":
    """The command, for click."""
    import click

    every = click.Option(
        ["--every", "every_s"],
        metavar="SECONDS",
        type=click.IntRange(1, 86_400),
        default=5,
        show_default=True,
        help="How often.",
    )
    return click.Command(
        "watch",
        callback=_watch,
        params=[every, *options_of_all()],
        help=_HELP,
        epilog=examples(_EXAMPLES),
    )


def _watch(url: str, token_file: str | None, as_json: bool, every_s: int) -> int:
    import click

    try:
        client = client_of(url, token_file)
        overview = client.get("overview")
    except AskingError as e:
        raise click.ClickException(printable(str(e))) from None
    try:
        with _showing(as_json) as show:
            show(overview)
            while True:
                time.sleep(every_s)
                try:
                    show(client.get("overview"))
                except AskingError as e:
                    click.echo(printable(f"{e} It is asked again."), err=True)
    except KeyboardInterrupt:
        return ALL_FIT


@contextmanager
def _showing(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Gives what shows an overview in the place of the one before, or prints its line."""
    if as_json:
        yield lambda overview: print(json.dumps(overview), flush=True)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), auto_refresh=False) as live:
        yield lambda overview: live.update(table_of(overview), refresh=True)
