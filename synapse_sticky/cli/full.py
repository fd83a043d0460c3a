"""The command line where there is click: all commands, and completion in the shell."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from synapse_sticky import __version__
from synapse_sticky.cli.base import BASE, BaseCommand
from synapse_sticky.cli.extra import EXTRA, ExtraCommand
from synapse_sticky.cli.plain import DESCRIPTION, PROGRAM
from synapse_sticky.cli.report import NO_START
from synapse_sticky.cli.texts import examples

if TYPE_CHECKING:
    import click

_COMPLETION = f"""\b
Completion in bash (zsh and fish have their own such line):
  eval "$(_SYNAPSE_STICKY_COMPLETE=bash_source {PROGRAM})"
"""


def prepare(arguments: Sequence[str]) -> Callable[[], int]:
    """Gives what runs the command that the arguments ask for. That gives the exit code, and raises
    what the command raises, and ``KeyboardInterrupt`` after Ctrl-C."""

    def run() -> int:
        import click

        try:
            code = group().main([*arguments], PROGRAM, standalone_mode=False)
        except click.ClickException as e:
            e.show()
            return NO_START
        except click.Abort:
            raise KeyboardInterrupt from None
        return int(code or 0)

    return run


def group() -> "click.Group":
    """All commands."""
    import click

    class Commands(click.Group):
        """Loads a command that needs extras only when it is asked for."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return [*(command.name for command in BASE), *(extra.name for extra in EXTRA)]

        def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
            for command in BASE:
                if command.name == name:
                    return _of_base(command)
            for extra in EXTRA:
                if extra.name == name:
                    return _of_extra(extra)
            return None

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            rows = [
                *((command.name, command.summary) for command in BASE),
                *((extra.name, extra.summary) for extra in EXTRA),
            ]
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    commands = Commands(PROGRAM, help=DESCRIPTION, epilog=_COMPLETION)
    return click.version_option(__version__, message="%(prog)s %(version)s")(commands)


def _of_base(command: BaseCommand) -> "click.Command":
    import click

    params: list[click.Parameter] = [
        click.Option(
            [*option.flags],
            help=option.help,
            required=option.is_needed,
            **_kind(option.metavar),
        )
        for option in command.options
    ]
    return click.Command(
        command.name,
        params=params,
        help=command.description,
        epilog=examples(command.examples),
        callback=command.run,
    )


def _kind(metavar: str) -> dict[str, Any]:
    import click

    if not metavar:
        return {"is_flag": True}
    return {"multiple": True, "metavar": metavar, "type": click.Path()}


def _of_extra(extra: ExtraCommand) -> "click.Command":
    import click

    if not (lacking := extra.lacks()):
        return extra.load()

    def refuse(arguments: Sequence[str]) -> int:
        raise click.ClickException(lacking)

    return click.Command(
        extra.name,
        params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
        callback=refuse,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
