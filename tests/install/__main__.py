"""Tries the ways to install the module: ``python -m tests.install [pip|python|debian|image ...]``.

Each begins with a Synapse that is configured for the module and lacks it, as after an upgrade, and
shows what Synapse says. Then the module is installed by the one command that the documentation
gives, Synapse is started, alone and with a worker, and sticky events come through.

``debian`` and ``image`` work in a Debian of their own, which needs root and debootstrap; without
these they are left out, and that is said. Exits with 1 if anything failed.
"""

import argparse
import sys
from pathlib import Path

from tests.install.place import debian, here
from tests.install.ways import debian_package, image, new_python, pip
from tests.say import say
from tests.wheels import PROJECT, MissingError, StepError
from tests.wheels.audit import find
from tests.wheels.prove import here as this_platform

_KEPT = PROJECT / ".venv-install"
_RELEASE = "trixie"
"""That of Synapse's image."""


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.install", description=__doc__)
    parser.add_argument("ways", nargs="*", metavar="WAY", help="pip, python, debian, image")
    parser.add_argument("--dist", type=Path, default=PROJECT / "dist", help="where the wheel is")
    options = parser.parse_args()
    ways = {"pip": pip, "python": new_python, "debian": debian_package, "image": image}
    failures = []
    for name in options.ways or ways:
        say(f"{name} ...")
        try:
            wheel = find(this_platform(), sorted(options.dist.resolve().glob("*.whl")))
            with here() if name in ("pip", "python") else debian(_RELEASE, _KEPT) as place:
                ways[name](place, wheel)
        except MissingError as e:
            say(f"{name}: left out: {e}")
        except StepError as e:
            say(f"{name}: FAILED: {e}")
            failures.append(name)
        else:
            say(f"{name}: works")
    if failures:
        sys.exit(f"These do not work: {', '.join(failures)}")


if __name__ == "__main__":
    main()
