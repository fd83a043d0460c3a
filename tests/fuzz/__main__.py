"""``python -m tests.fuzz [--minutes 10]``: every property again and again, with other seeds each
time. Prints the seeds; stops at the first that fails."""

import argparse
import os
import secrets
import subprocess
import sys
import time

from tests.lab.say import say

_PROPERTIES = [
    *("tests/fuzz", "tests/unit/test_config.py", "tests/unit/test_delivery.py"),
    *("tests/unit/test_sliding.py", "-k"),
    "fuzz or any_value or meanwhile or takes_its_time or each_event_once or tokens_of_pages",
]
_PROPTEST_CASES = "5000"


def main() -> None:
    """Runs until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="the first seed")
    options = parser.parse_args()
    end_s = time.monotonic() + options.minutes * 60
    rounds = 0
    while time.monotonic() < end_s or not rounds:
        seed = secrets.randbits(32) if options.seed is None or rounds else options.seed
        say(f"round {rounds + 1}, seed {seed}")
        pytest = [*(sys.executable, "-m", "pytest", "-q", "-x"), *_PROPERTIES]
        pytest += [f"--hypothesis-seed={seed}", "--hypothesis-profile=fuzz"]
        run(pytest)
        # proptest keeps the seed of what fails in rust/tests/proptest-regressions.
        environment = {**os.environ, "PROPTEST_CASES": _PROPTEST_CASES}
        run(["cargo", "test", "--release", "--quiet", "--tests"], environment)
        rounds += 1
    say(f"{rounds} rounds, nothing found")


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs it, and ends this program if it fails."""
    if subprocess.run(command, env=environment, check=False).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
