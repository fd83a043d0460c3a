"""What an administrator runs: ``synapse-sticky`` and its commands.

``base`` has the commands that need nothing but Synapse, ``extra`` the others. ``full`` is the
command line with click, ``plain`` the one of the base commands where there is no click.
"""

import sys
from collections.abc import Sequence

from synapse_sticky.cli import full, plain
from synapse_sticky.cli.extra import has_click
from synapse_sticky.cli.report import NO_START, SOMETHING_OFF


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments ask for, and gives the exit code.

    Args:
        arguments: those after the program's name; None for those that it was called with.

    Raises:
        SystemExit: there is no click, and the arguments are wrong or help was asked for; or the
            shell has asked how to complete a line.
    """
    given = sys.argv[1:] if arguments is None else [*arguments]
    run = full.prepare(given) if has_click() else plain.prepare(given)
    try:
        return run()
    except KeyboardInterrupt:
        return SOMETHING_OFF
    except (Exception, SystemExit) as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        # Whatever it is, nothing is known of this Synapse then.
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        command = next((word for word in given if not word.startswith("-")), "")
        print(f"synapse-sticky {command} itself failed: {reason}", file=sys.stderr)
        return NO_START
