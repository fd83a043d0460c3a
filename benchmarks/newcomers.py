"""Many newcomers in a row: do they get everything, and how long does it take?

``python -m benchmarks.newcomers --runs 20 --plain --busy``
"""

import argparse
import contextlib
import statistics
import sys

from tests.demo import Outcome, play
from tests.lab import Lab
from tests.lab.lab import busy_cores
from tests.lab.say import say


def main() -> None:
    """Each run makes a new room on the same three servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--events", type=int, default=130, help="of each of two servers")
    parser.add_argument("--plain", action="store_true", help="the newcomer is a plain Synapse")
    parser.add_argument("--busy", action="store_true", help="other programs keep two cores busy")
    args = parser.parse_args()
    outcomes: list[Outcome] = []
    with Lab() as lab, busy_cores() if args.busy else contextlib.nullcontext():
        servers = lab.servers({}, {}, {"module": not args.plain})
        for run in range(args.runs):
            say(f"Run {run + 1} of {args.runs}")
            outcomes.append(play(servers, args.events, patience_s=300))
    complete = sum(outcome.arrived == outcome.sent for outcome in outcomes)
    times_s = [outcome.last_s for outcome in outcomes if outcome.last_s is not None]
    say(
        f"{complete} of {len(outcomes)} runs delivered everything; time to the last event: "
        f"median {statistics.median(times_s):.2f} s, longest {max(times_s):.2f} s"
    )
    if complete != len(outcomes):
        sys.exit("Something did not arrive.")


if __name__ == "__main__":
    main()
