"""What all commands share that ask the API: where it is, the token, and ``--json``."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synapse_sticky.cli.report import ALL_FIT

if TYPE_CHECKING:
    import click

    from synapse_sticky.cli.api.client import Client

URL, TOKEN = "SYNAPSE_STICKY_URL", "SYNAPSE_STICKY_TOKEN"
ACCESS = f"""
\b
The token is that of a server admin. It is read from the environment variable
{TOKEN}, or from a file (--token-file), and never from the command line, which
others on the machine can see. {URL} stands for --url.
"""
"""Belongs in each command's help."""


def asking(
    name: str,
    description: str,
    lines: Sequence[str],
    ask: Callable[..., Any],
    show: Callable[[Any], None],
    params: "Sequence[click.Parameter]" = (),
) -> "click.Command":
    """A command that asks the API once.

    Args:
        lines: its examples.
        ask: is called with a ``Client`` and the values of ``params``; gives the answer.
        show: prints the answer for people.
    """
    import click

    from synapse_sticky.cli.api.client import AskingError
    from synapse_sticky.cli.texts import examples, printable

    def run(url: str, token_file: str | None, as_json: bool, **options: Any) -> int:
        try:
            answer = ask(client_of(url, token_file), **options)
        except AskingError as e:
            raise click.ClickException(printable(str(e))) from None
        if as_json:
            print(json.dumps(answer, indent=2))
        else:
            show(answer)
        return ALL_FIT

    return click.Command(
        name,
        callback=run,
        params=[*params, *options_of_all()],
        help=f"{description}\n\n{ACCESS}",
        epilog=examples(lines),
    )


def options_of_all() -> "list[click.Parameter]":
    """Where the API is, the token, and ``--json``: ``url``, ``token_file`` and ``as_json``."""
    import click

    return [
        click.Option(
            ["--url"],
            default="http://localhost:8008",
            show_default=True,
            envvar=URL,
            help="The homeserver, at a listener with the resource `client`. A path in it takes the"
            " place of /_synapse/sticky.",
        ),
        click.Option(
            ["--token-file"], metavar="FILE", type=click.Path(), help="A file with the token."
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the answer as it is."),
    ]


def client_of(url: str, token_file: str | None) -> "Client":
    """Whoever asks the API.

    Raises:
        AskingError: there is no token, or the address is none.
    """
    import os

    from synapse_sticky.cli.api.client import AskingError, Client

    token = os.environ.get(TOKEN, "")
    if token_file is not None:
        try:
            token = Path(token_file).read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise AskingError(f"The file with the token cannot be read: {e}") from None
    if not token.strip():
        raise AskingError(
            f"There is no token. Set {TOKEN}, or give --token-file. It is the access token of a"
            " server admin."
        )
    return Client(url, token.strip())
