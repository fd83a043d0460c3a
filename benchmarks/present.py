"""How soon a newcomer's map of a call is right, whatever was superseded before it joined.

``python -m benchmarks.present --runs 3 --plain``

Users of two servers have sent many sticky events of few keys. The newest of a key counts: half of
the keys are there, half have left. A third server joins, and a client there keeps the map. Beside
its wrong seconds this prints what the newcomer's processing took, and what it asked others for.
"""

import argparse
import re
import time
from collections import Counter

import attr

from benchmarks.call.causes import Party
from benchmarks.call.observers import SyncObserver
from benchmarks.call.people import Participant
from benchmarks.call.spans import intersect, subtract
from benchmarks.events import cpu_s
from tests.integration.rooms import NO_LIMITS, room_of, wait_until_all_pushed
from tests.lab import Homeserver, Lab, wait_until
from tests.lab.say import say

_USERS = 5
_ASKED = re.compile(
    r'Processed request.*"(?:GET|POST) /_matrix/federation/v1/'
    r"(get_missing_events|state_ids|state|event|event_auth|backfill)/"
)


@attr.s(auto_attribs=True, frozen=True)
class Outcome:
    """Of one newcomer."""

    right_s: float
    ghost_s: float
    missing_s: float
    all_s: float
    cpu_s: float
    asked: Counter[str]

    def __str__(self) -> str:
        asked = ", ".join(f"{name} {count}" for name, count in sorted(self.asked.items()))
        return (
            f"right after {self.right_s:.1f} s, {self.ghost_s:.0f} ghost and"
            f" {self.missing_s:.0f} missing seconds; all pushed after {self.all_s:.1f} s,"
            f" {self.cpu_s:.1f} s of CPU; asked: {asked}"
        )


def _asked(servers: list[Homeserver]) -> Counter[str]:
    return Counter(kind for server in servers for kind in _ASKED.findall(server.output()))


def play(servers: list[Homeserver], keys: int, superseded: int) -> Outcome:
    """A newcomer to a room in which each key has so many events that do not count any more."""
    a, b, c = servers
    users = [server.user() for _ in range(_USERS) for server in (a, b)]
    room_id = room_of(*users, via=a)
    people = [
        Participant(Party(f"key {number}", "", room_id), users[number % len(users)], f"{number}")
        for number in range(keys)
    ]
    for turn in range(superseded + 1):
        for number, person in enumerate(people):
            is_there = (superseded - turn + number) % 2 == 0
            (person.come if is_there else person.go)()
    asked, spent_s = _asked([a, b]), cpu_s(c)
    observer = SyncObserver(Party("observer", ""), c.user())
    observer.user.join(room_id, a.name)
    start_s = time.monotonic()
    observer.open()
    keys_there = {p.key for p in people[::2]}
    # What is superseded may make the map right in between, and wrong again.
    wait_until(lambda: observer.now() == keys_there, "the map to be right", 300)
    for server in (a, b):
        wait_until_all_pushed(server, room_id)
    end_s = time.monotonic()
    spent_s = cpu_s(c) - spent_s
    wait_until(lambda: observer.now() == keys_there, "the map to be right", 300)
    observer.close()
    shown, seen = observer.shown((p.key for p in people), end_s), [(start_s, end_s)]
    ghosts = [s for p in people[1::2] for s in intersect(seen, shown[p.key])]
    missing = [s for p in people[::2] for s in subtract(seen, shown[p.key])]
    return Outcome(
        max(end for _, end in [*ghosts, *missing]) - start_s,
        sum(end - start for start, end in ghosts),
        sum(end - start for start, end in missing),
        end_s - start_s,
        spent_s,
        _asked([a, b]) - asked,
    )


def main() -> None:
    """Each run makes a new room on the same three servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--keys", type=int, default=50)
    parser.add_argument("--superseded", type=int, default=9, help="of each key")
    parser.add_argument("--plain", action="store_true", help="the newcomer is a plain Synapse")
    args = parser.parse_args()
    with Lab() as lab:
        servers = lab.servers(
            {"config": NO_LIMITS}, {"config": NO_LIMITS}, {"module": not args.plain}
        )
        for run in range(args.runs):
            say(f"Run {run + 1}: {play(servers, args.keys, args.superseded)}")


if __name__ == "__main__":
    main()
