"""What an administrator runs: ``synapse-sticky check``, ``migrate-tables`` and ``drain``."""

import argparse
import sys
from collections.abc import Sequence

from synapse_sticky.cli.check import check
from synapse_sticky.cli.drain import drain
from synapse_sticky.cli.report import NO_START, SOMETHING_OFF
from synapse_sticky.cli.tables import migrate_tables

_CHECK = """
Says which duties fit the Synapse of this environment. It starts nothing, and does not write to the
database.
Exit code: 0 if all fit, 1 if something would be off, 2 if Synapse would not start or would not
guard who gets the sticky sections, or if the check itself failed.
"""
_MIGRATE = """
Makes the module's tables in the Postgres of this configuration. Run it before synapse_port_db,
which copies those tables only that are on both sides.
Exit code: 0 if the tables are there, 1 if sticky events of other servers were there before them, 2
if it failed.
"""
_DRAIN = """
Prints what waits for the running module until nothing does, so that the module can be taken out. It
only reads the database. Before, set `federation: {mode: off}` and restart Synapse.
Exit code: 0 if nothing waits, 1 if something does, 2 if it failed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments ask for, and gives the exit code.

    Args:
        arguments: those after the program's name; None for those that it was called with.
    """
    parser = argparse.ArgumentParser(prog="synapse-sticky", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    to_check = commands.add_parser("check", help="whether it fits Synapse", description=_CHECK)
    to_check.add_argument(
        "-c",
        "--config-path",
        action="append",
        default=[],
        metavar="FILE",
        help="homeserver.yaml, and each file that goes with it; that of a worker stands for one"
        " more process. Its database is looked into as well",
    )
    to_check.add_argument("--json", action="store_true", help="print one JSON object")
    to_migrate = commands.add_parser(
        "migrate-tables", help="make its tables, before synapse_port_db", description=_MIGRATE
    )
    to_drain = commands.add_parser(
        "drain", help="whether anything waits, before it is taken out", description=_DRAIN
    )
    for parser_of_one in (to_migrate, to_drain):
        parser_of_one.add_argument(
            "-c",
            "--config-path",
            action="append",
            required=True,
            metavar="FILE",
            help="homeserver.yaml, and each file that all processes read",
        )
    to_drain.add_argument("--once", action="store_true", help="look once, and do not wait")
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "check":
                return check(options.config_path, as_json=options.json)
            case "drain":
                return drain(options.config_path, once=options.once)
            case _:
                return migrate_tables(options.config_path)
    except KeyboardInterrupt:
        return SOMETHING_OFF
    except (Exception, SystemExit) as e:
        # Whatever it is, nothing is known of this Synapse then.
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        print(f"synapse-sticky {options.command} itself failed: {reason}", file=sys.stderr)
        return NO_START
