"""The commands that need nothing but Synapse: ``check``, ``drain`` and ``migrate-tables``.

Each is described once. ``plain`` makes argparse's commands of the descriptions, ``full`` those of
click, which is an extra.
"""

from collections.abc import Callable, Sequence
from typing import Any

import attr

from synapse_sticky.cli.check import check
from synapse_sticky.cli.drain import drain
from synapse_sticky.cli.tables import migrate_tables


@attr.s(auto_attribs=True, frozen=True, slots=True)
class Option:
    """An option of a command.

    flags: as the user writes it; the last is the long one.
    metavar: what stands for its value, and the option may be given several times; empty if it has
        no value.
    is_needed: whether the command refuses to run without it.
    """

    flags: tuple[str, ...]
    help: str
    metavar: str = ""
    is_needed: bool = False

    @property
    def name(self) -> str:
        """The name of its value: ``--config-path`` gives ``config_path``."""
        return self.flags[-1].removeprefix("--").replace("-", "_")


@attr.s(auto_attribs=True, frozen=True, slots=True)
class BaseCommand:
    """A command.

    run: is called with the values of the options, by their names, and gives the exit code.
    """

    name: str
    summary: str
    description: str
    examples: tuple[str, ...]
    options: Sequence[Option]
    run: Callable[..., int]


def _check(config_path: Sequence[str], json: bool) -> int:
    return check(config_path, as_json=json)


def _drain(config_path: Sequence[str], once: bool) -> int:
    return drain(config_path, once=once)


def _migrate_tables(config_path: Sequence[str]) -> int:
    return migrate_tables(config_path)


def _config(help_text: str, **more: Any) -> Option:
    return Option(("-c", "--config-path"), help_text, "FILE", **more)


_OF_ALL_PROCESSES = _config(
    "homeserver.yaml, and each file that all processes read", is_needed=True
)

BASE: Sequence[BaseCommand] = (
    BaseCommand(
        "check",
        "whether it fits Synapse",
        "Says which duties fit the Synapse of this environment. It starts nothing, and does not"
        " write to the database. Exit code: 0 if all fit, 1 if something would be off, 2 if Synapse"
        " would not start or would not guard who gets the sticky sections, or if the check itself"
        " failed.",
        (
            "synapse-sticky check -c homeserver.yaml",
            "synapse-sticky check -c homeserver.yaml -c worker1.yaml --json",
        ),
        (
            _config(
                "homeserver.yaml, and each file that goes with it; that of a worker stands for one"
                " more process. Its database is looked into as well"
            ),
            Option(("--json",), "print one JSON object"),
        ),
        _check,
    ),
    BaseCommand(
        "drain",
        "whether anything waits, before it is taken out",
        "Prints what waits for the running module until nothing does, so that the module can be"
        " taken out. It only reads the database. Before, set `federation: {mode: off}` and restart"
        " Synapse. Exit code: 0 if nothing waits, 1 if something does, 2 if it failed.",
        ("synapse-sticky drain -c homeserver.yaml",),
        (_OF_ALL_PROCESSES, Option(("--once",), "look once, and do not wait")),
        _drain,
    ),
    BaseCommand(
        "migrate-tables",
        "make its tables, before synapse_port_db",
        "Makes the module's tables in the Postgres of this configuration. Run it before"
        " synapse_port_db, which copies those tables only that are on both sides. Exit code: 0 if"
        " the tables are there, 1 if sticky events of other servers were there before them, 2 if it"
        " failed.",
        ("synapse-sticky migrate-tables -c homeserver-postgres.yaml",),
        (_OF_ALL_PROCESSES,),
        _migrate_tables,
    ),
)
