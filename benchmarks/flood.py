"""How soon another server's event arrives while a server that floods is being refused.

``python -m benchmarks.flood --runs 3``
"""

import argparse
import functools
import statistics
import sys
import time

from tests.integration.rooms import entered, introduce, limits, room_of
from tests.lab import Lab, wait_until
from tests.lab.say import say

FLOOD = 300
MOST_S = 2.0


def main() -> None:
    """The limit of ``reject`` is 10 a second and 100 at once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    config = limits("reject", per_server={"per_second": 10, "burst_count": 100})
    times_s = []
    for run in range(args.runs):
        with Lab() as lab:
            a, b, c = lab.servers({"module": False}, {"module": False}, {"config": config})
            mallory, bob, carol = a.user(), b.user(), c.user()
            room_id = room_of(mallory, bob, carol, via=a)
            introduce(b, c)
            flood = {mallory.send_sticky(room_id) for _ in range(FLOOD)}
            wait_until(functools.partial(c.log_has, "per_server: refused"), "a refusal")
            start_s = time.monotonic()
            event_id = bob.send_sticky(room_id)
            seen = carol.collect_sticky(room_id, {event_id})
            times_s.append(seen[event_id] - start_s)
            assert not flood <= set(entered(c, room_id)), "the flood was not being refused any more"
            say(f"Run {run + 1}: the event arrived within {times_s[-1]:.2f} s", end="")
            everything_s = carol.collect_sticky(room_id, flood, 300)
            assert flood <= everything_s.keys()
            say(f", and all {FLOOD} of the flood in {max(everything_s.values()) - start_s:.0f} s")
    say(f"median {statistics.median(times_s):.2f} s, longest {max(times_s):.2f} s")
    if max(times_s) > MOST_S:
        sys.exit("That is more than it should be.")


if __name__ == "__main__":
    main()
