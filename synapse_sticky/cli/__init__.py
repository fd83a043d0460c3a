"""What an administrator runs: ``synapse-sticky check``."""

import argparse
import sys
from collections.abc import Sequence

from synapse_sticky.cli.check import check
from synapse_sticky.cli.report import NO_START

_CHECK = """
Says which duties fit the Synapse of this environment. It starts nothing, and does not write to the
database.
Exit code: 0 if all fit, 1 if something would be off, 2 if Synapse would not start or would not
guard who gets the sticky sections, or if the check itself failed.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments ask for, and gives the exit code.

    Args:
        arguments: those after the program's name; None for those that it was called with.
    """
    parser = argparse.ArgumentParser(prog="synapse-sticky", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
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
    options = parser.parse_args(arguments)
    try:
        return check(options.config_path, as_json=options.json)
    except Exception as e:
        # Whatever it is, nothing is known of this Synapse then.
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        print(f"synapse-sticky check itself failed: {reason}", file=sys.stderr)
        return NO_START
