"""The command line where there is no click: the base commands alone."""

import argparse
from collections.abc import Callable, Sequence

from synapse_sticky import __version__
from synapse_sticky.cli.base import BASE, Option
from synapse_sticky.cli.extra import EXTRA
from synapse_sticky.cli.report import NO_START

PROGRAM = "synapse-sticky"
DESCRIPTION = "What an administrator of Synapse with synapse-sticky runs."


def prepare(arguments: Sequence[str]) -> Callable[[], int]:
    """Gives what is to be called. It gives the exit code.

    Raises:
        SystemExit: the arguments are wrong, or help was asked for; that is printed.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=f"Other commands need more packages: {', '.join(extra.name for extra in EXTRA)}."
        " Each says which, if you run it.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in BASE:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=f"Examples: {'; '.join(command.examples)}",
        )
        _add(one, command.options)
    for extra in EXTRA:
        # Not in the help. Its own options are not known.
        other = commands.add_parser(extra.name, add_help=False)
        other.add_argument("arguments", nargs=argparse.REMAINDER)
    options, unknown = parser.parse_known_args(arguments)
    for extra in EXTRA:
        if options.command == extra.name:
            parser.exit(NO_START, f"{extra.lacks()}\n")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    (command,) = (command for command in BASE if command.name == options.command)
    values = {option.name: getattr(options, option.name) for option in command.options}
    return lambda: command.run(**values)


def _add(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    for option in options:
        if option.metavar:
            parser.add_argument(
                *option.flags,
                action="append",
                default=[],
                required=option.is_needed,
                metavar=option.metavar,
                help=option.help,
            )
        else:
            parser.add_argument(*option.flags, action="store_true", help=option.help)
