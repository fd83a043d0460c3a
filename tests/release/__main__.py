"""The release: ``python -m tests.release check``, or ``notes TAG``.

``notes`` prints what CHANGELOG says of the version, if the tag is of the version that is here.
``check`` runs each command of the workflows dry, and says what a release of what is here lacks,
which is no failure. Exits with 1 if a command would not run or an action is not pinned.
"""

import argparse
import sys

from tests.release.notes import ReleaseError, lacking, notes
from tests.say import say


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("check")
    steps.add_parser("notes").add_argument("tag")
    options = parser.parse_args()
    if options.step == "notes":
        try:
            say(notes(options.tag))
        except ReleaseError as e:
            sys.exit(str(e))
        return
    # Only here, as it needs yaml: the notes are made with Python alone.
    from tests.release.dry import run_all

    if failures := run_all(say):
        sys.exit("\n".join(["", "These would not work:", *failures]))
    for lack in lacking():
        say(f"Before the next release: {lack}")
    say("Each command would run.")


if __name__ == "__main__":
    main()
