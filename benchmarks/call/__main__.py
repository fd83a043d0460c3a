"""``python -m benchmarks.call [--seed 1] [--seconds 240] [--observers 1] [--plain]``.

One call, squeezed into minutes. Four homeservers: A has made the room, B cannot be reached for a
minute, C joins in the middle, D floods. Sixty participants come, renew and go; among them a gateway
whose one account speaks for twenty, a client that flaps, one that crashes and whose delayed leave
fires (MSC4140), and one that is banned with all that it sent. An app is restarted, an ACL denies a
server for a while, and A is restarted.

Observers at A, B and C keep the map that MSC4354's addendum describes: by /sync, by sliding sync,
and matrix-js-sdk with its own store. The truth is what the
participants' own clients know: somebody is there from the 200 of the join to the request of the
leave, or until the delayed leave is due. While such a request is under way, nobody can know.
What an observer shows beyond that are ghost seconds, what it lacks are missing seconds. Two further
participants come and go in a room without trouble. How long these changes take is what the machine
itself costs; so much is taken off each wrong span. While servers are apart, and shortly after they
meet, nobody can tell the one what happens at the other: this has rows of its own, which the sum
leaves out.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.call.report import Result, draw, look_at, missed_goals, say_longest, say_table
from benchmarks.call.story import Call
from tests.lab import Lab
from tests.lab.js_sdk.installation import missing
from tests.lab.say import say


def main() -> None:
    """Plays the call, and prints one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.call")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--participants", type=int, default=60)
    parser.add_argument("--observers", type=int, default=1, help="of each kind, at each server")
    parser.add_argument(
        "--sdk", action=argparse.BooleanOptionalAction, default=True, help="matrix-js-sdk as well"
    )
    parser.add_argument("--plain", action="store_true", help="plain Synapse as well, same seed")
    parser.add_argument(
        "--check", action="store_true", help="plain Synapse as well; fail if a goal is missed"
    )
    parser.add_argument("--not-exempt", action="store_true", help="the gateway is like all others")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw (needs matplotlib)")
    parser.add_argument(
        "--longest", type=int, default=0, help="print so many wrong spans of each cause"
    )
    parser.add_argument("--keep", type=Path, help="where to put the servers' folders")
    args = parser.parse_args()
    without_sdk = missing() if args.sdk else "it was not asked for"
    if without_sdk is not None:
        say(f"Without matrix-js-sdk: {without_sdk}.")
    results: dict[str, Result] = {}
    for plain in (False, True) if args.plain or args.check else (False,):
        name = "plain Synapse" if plain else "with synapse-sticky"
        with Lab() as lab:
            say(f"seed {args.seed}, {name}: starting")
            call = Call(
                lab,
                args.seed,
                args.seconds,
                participants=args.participants,
                observers=args.observers,
                sdk=without_sdk is None,
                plain=plain,
                exempt=not args.not_exempt,
            )
            try:
                call.play()
            finally:
                if args.keep:
                    shutil.copytree(lab.folder, args.keep / name, dirs_exist_ok=True)
            results[name] = look_at(call)
            say_longest(call, results[name], args.longest)
    say_table(results)
    if args.plot:
        draw(results, args.plot)
    if args.check:
        missed = missed_goals(results["with synapse-sticky"], results["plain Synapse"])
        if missed:
            sys.exit(f"Goals are missed: {'; '.join(missed)}.")


if __name__ == "__main__":
    main()
