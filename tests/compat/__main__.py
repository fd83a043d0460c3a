"""Tries the module on several versions of Synapse: ``python -m tests.compat [VERSION ...]``.

Without a version, all that are listed and the newest that pip finds. What came of them is kept in
docs/compat, and the table of docs/versions.md is written anew. Exits with 1 if anything was not as
it should be.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from tests.compat import LISTED
from tests.compat.environment import (
    Environment,
    StepError,
    build_wheel,
    clean_env,
    end_of_output,
    ended,
    newest,
    workplace,
)
from tests.compat.results import PASSED, Result, read_check, stale, told_of, write_table
from tests.lab.say import say

_CHECK_S = 120
_STORY_S = 1200


def check(environment: Environment, folder: Path) -> dict[str, object]:
    """The module's own check, in the environment.

    Raises:
        StepError: it did not answer.
    """
    command = (environment.python, "-m", "synapse_sticky", "check", "--json")
    done = ended(command, _CHECK_S, folder)
    try:
        answer = read_check(done.stdout)
    except ValueError as e:
        said = end_of_output(done)
        raise StepError(f"{e}; it ended with {done.returncode}:\n{said}") from None
    if done.returncode != answer["exit_code"]:
        raise StepError(f"exit code {done.returncode}, but it printed {answer['exit_code']}")
    if answer["synapse"] != environment.version:
        raise StepError(f"it is about Synapse {answer['synapse']}")
    return answer


def story(environment: Environment, folder: Path) -> dict[str, str]:
    """How each part of the story ended, on the environment's Synapse.

    Raises:
        StepError: the tests ended without saying.
    """
    report = environment.folder / "story.xml"
    report.unlink(missing_ok=True)
    options = ["-m", "compat", "-v", "-p", "no:cacheprovider", f"--junitxml={report}"]
    parts = told_of(environment.version)
    tests = [f"tests/compat/test_story.py::test_{part}" for part in parts]
    command = (environment.python, "-m", "pytest", *options, *tests)
    with subprocess.Popen(command, cwd=folder, env=clean_env()) as running:
        try:
            running.wait(_STORY_S)
        except subprocess.TimeoutExpired:
            running.terminate()  # ends its homeservers as well
            raise StepError(f"not done within {_STORY_S} s") from None
    if not report.exists():
        raise StepError(f"pytest ended with {running.returncode}, without a report")
    cases = ElementTree.parse(report).iter("testcase")  # noqa: S314  # pytest's, of just now
    outcomes = {case.attrib["name"].removeprefix("test_"): _outcome(case) for case in cases}
    return {part: outcomes[part] for part in parts if part in outcomes}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else PASSED


def try_version(version: str, wheel: Path, folder: Path) -> list[str]:
    """Everything with one version. Gives what was not as it should be, each with its step."""
    environment = Environment(version)
    step = "environment"
    failures: list[str] = []
    answer = None
    try:
        there = environment.is_there()
        say(f"{version}: environment{', which is there' if there else ': making it'}")
        if not there:
            environment.make()
        environment.install(wheel)
        step = "check"
        say(f"{version}: check")
        try:
            answer = check(environment, folder)
        except StepError as e:
            # The story is worth telling all the same.
            failures.append(f"check: {e}")
        step = "story"
        say(f"{version}: story")
        told = story(environment, folder)
    except StepError as e:
        return [*failures, f"{step}: {e}"]
    result = Result(version, answer, told)
    result.keep()
    return [*failures, *result.problems()]


def try_all(asked: list[str]) -> list[str]:
    """Everything with each version. Gives what was not as it should be."""
    failures = []
    versions = list(dict.fromkeys(asked or LISTED))
    try:
        if not asked and (latest := newest()) not in versions:
            versions.append(latest)
    except StepError as e:
        failures.append(f"the newest Synapse: {e}")
    say(f"Synapse {', '.join(versions)}\nBuilding the module")
    try:
        wheel = build_wheel()
    except StepError as e:
        return [*failures, f"the module: {e}"]
    folder = workplace()
    for version in versions:
        began_s = time.monotonic()
        found = try_version(version, wheel, folder)
        took_s = time.monotonic() - began_s
        verdict = "NOT as it should be" if found else "as it should be"
        say(f"{version}: {verdict} ({took_s:.0f} s)\n")
        failures += [f"{version}, {failure}" for failure in found]
    write_table()
    return failures


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of Synapse")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--table",
        action="store_true",
        help="only write the table of docs/versions.md, of what is kept",
    )
    only.add_argument(
        "--check",
        action="store_true",
        help="only say whether the table of docs/versions.md is of what is kept",
    )
    options = parser.parse_args()
    if options.check:
        sys.exit("\n".join(stale()) or 0)
    if options.table:
        write_table()
        return
    if failures := try_all(options.versions):
        sys.exit("\n".join(failures))
    say("Everything is as it should be; what is kept of it is in docs/compat")


if __name__ == "__main__":
    main()
