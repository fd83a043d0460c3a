"""Builds, audits and proves the wheels: ``python -m tests.wheels build|audit|prove|twice``.

``build`` builds the sdist and a wheel for each platform, or for those that are named. ``audit``
looks at all that was built. ``prove`` installs the wheel for this machine into a clean environment
of each CPython that it finds, starts Synapse there and sends a sticky event; then the same with the
sdist. ``twice`` builds in two clones of the last commit and compares the bytes.

Exits with 1 if anything failed or was not to be had; what could be done is done all the same.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from tests.say import say
from tests.wheels import PROJECT, StepError
from tests.wheels.audit import audited, described
from tests.wheels.build import build_sdist, build_wheel, chosen
from tests.wheels.prove import prove_sdist, prove_wheel
from tests.wheels.twice import compare

_SDIST = "sdist"


def _each(steps: Iterable[tuple[str, Callable[[], object]]]) -> list[str]:
    """Does all steps, one after the other. Gives what failed."""
    failures = []
    for name, step in steps:
        say(f"{name} ...")
        try:
            outcome = step()
        except StepError as e:
            failures.append(f"{name}: {e}")
            say(f"{name}: FAILED: {e}")
        else:
            say(f"{name}: {described(outcome) if isinstance(outcome, Path) else outcome}")
    return failures


def _build(names: list[str], out: Path) -> list[str]:
    platforms = chosen([name for name in names if name != _SDIST])
    if names == [_SDIST]:
        platforms = []
    steps: list[tuple[str, Callable[[], object]]] = [
        (p.name, partial(build_wheel, p, out)) for p in platforms
    ]
    if not names or _SDIST in names:
        steps.append((_SDIST, partial(build_sdist, out)))
    return _each(steps)


def _audit(names: list[str], out: Path) -> list[str]:
    wheels = sorted(out.glob("*.whl"))
    if not wheels:
        return [f"{out}: there is no wheel"]
    platforms = chosen(names)
    return _each((p.name, partial(audited, p, wheels)) for p in platforms)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheels", description=__doc__)
    parser.add_argument("step", choices=("build", "audit", "prove", "twice"))
    parser.add_argument("names", nargs="*", metavar="PLATFORM", help="such as manylinux-x86_64")
    parser.add_argument("--out", type=Path, default=PROJECT / "dist", help="dist, if not given")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="PROGRAM",
        help="an interpreter to prove it on, instead of all that are found",
    )
    options = parser.parse_args()
    out = options.out.resolve()
    try:
        if options.step == "build":
            failures = _build(options.names, out)
        elif options.step == "audit":
            failures = _audit(options.names, out)
        elif options.step == "prove":
            what = options.names or ["wheel", _SDIST]
            failures = []
            if "wheel" in what:
                failures += _each(prove_wheel(out, options.python))
            if _SDIST in what:
                failures += _each(prove_sdist(out, options.python))
        else:
            failures = _each((p.name, partial(compare, p)) for p in chosen(options.names))
    except StepError as e:
        failures = [str(e)]
    if failures:
        sys.exit("\n".join(["", "Not everything is as it should be:", *failures]))
    say("Everything is as it should be.")


if __name__ == "__main__":
    main()
