"""What an incremental /sync costs: with the module, without it, and without sticky events.

Two runs of the same program differ by a percent or two: so each server starts several times, and
there are two without sticky events, which together are what the others are compared with.

``python -m benchmarks.sync --starts 8 --rounds 10``, or for a short look ``--starts 1``
"""

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attr

from tests.lab import Client, Homeserver, Lab
from tests.lab.say import say

ROOMS = {"100 rooms": 100, "5 rooms": 5}
EVENTS_PER_ROOM = 3
IDLE, PLAIN, STICKY = "idle", "one new plain event", "one new sticky event"
OFF, AGAIN, ON, MODULE = "off", "off, again", "on", "on, with the module"
MOST_RATIO = 1.02
WARM_UP = 60
NO_FEATURE = {"module": False, "extra": {"experimental_features": {"msc4354_enabled": False}}}
# As ever, but for setting the rooms up at once.
CONFIG = {"local": {"per_user": {"per_second": 10_000, "burst_count": 100_000}}}
KINDS: dict[str, dict[str, Any]] = {
    OFF: NO_FEATURE,
    AGAIN: NO_FEATURE,
    ON: {"module": False},
    MODULE: {"config": CONFIG},
}


@attr.s(auto_attribs=True, frozen=True)
class Side:
    """A homeserver with its users."""

    kind: str
    server: Homeserver
    sender: Client
    readers: dict[str, Client]
    room_id: str
    """That all of them are in."""
    tokens: dict[str, str] = attr.Factory(dict)
    """Up to where each user has synced."""

    def catch_up(self) -> None:
        """Syncs until nothing is new."""
        for reader, client in self.readers.items():
            joined = True
            while joined:
                answer = client.sync(self.tokens.get(reader))
                self.tokens[reader] = answer["next_batch"]
                joined = bool(joined_rooms(answer))

    def send(self, *, sticky: bool) -> None:
        """A sticky event is a plain one where there are none."""
        if sticky and self.kind not in (OFF, AGAIN):
            self.sender.send_sticky(self.room_id)
        else:
            self.sender.send(self.room_id)

    def cpu_s(self) -> float:
        """The CPU time that the process has used, exactly."""
        assert self.server.process is not None
        return time.clock_gettime(~self.server.process.pid << 3 | 2)

    def batch(self, reader: str, requests: int) -> tuple[float, list[float]]:
        """The CPU time of each of so many requests, and how long each took."""
        client, since, times_s = self.readers[reader], self.tokens[reader], []
        before_s = self.cpu_s()
        for _ in range(requests):
            start_s = time.perf_counter()
            client.sync(since)
            times_s.append(time.perf_counter() - start_s)
        return (self.cpu_s() - before_s) / requests, times_s


def set_up(kind: str, server: Homeserver) -> Side:
    """The same on each server: rooms with unexpired sticky events in them, or plain ones."""
    sender, *others = (server.user(name) for name in ("sender", "many", "few"))
    readers = dict(zip(ROOMS, others, strict=True))
    rooms = [sender.create_room() for _ in range(max(ROOMS.values()))]
    side = Side(kind, server, sender, readers, rooms[0])
    for (_, count), reader in zip(ROOMS.items(), others, strict=True):
        for room_id in rooms[:count]:
            reader.join(room_id)
    for room_id in rooms:
        for _ in range(EVENTS_PER_ROOM):
            attr.evolve(side, room_id=room_id).send(sticky=True)
    return side


@attr.s(auto_attribs=True)
class Case:
    """CPU time of a request by kind of server, of each round; and the times that requests took."""

    reader: str
    what: str
    cpu_s: dict[str, list[float]] = attr.Factory(lambda: {kind: [] for kind in KINDS})
    times_s: dict[str, list[float]] = attr.Factory(lambda: {kind: [] for kind in KINDS})

    def ratios(self, kind: str) -> list[float]:
        """CPU time against that of the two servers without the feature, of each round."""
        off_s = map(statistics.mean, zip(self.cpu_s[OFF], self.cpu_s[AGAIN], strict=True))
        return [one_s / both_s for one_s, both_s in zip(self.cpu_s[kind], off_s, strict=True)]

    def medians(self, kind: str, starts: int) -> list[float]:
        """The median ratio of each start."""
        ratios = self.ratios(kind)
        rounds = len(ratios) // starts
        return [statistics.median(ratios[start * rounds :][:rounds]) for start in range(starts)]

    def estimate(self, kind: str, starts: int) -> tuple[float, float]:
        """The mean of the starts, and twice its standard error."""
        medians = self.medians(kind, starts)
        if starts < 2:
            return medians[0], math.inf
        return statistics.mean(medians), 2 * statistics.stdev(medians) / math.sqrt(starts)


def everywhere(sides: Sequence[Side], function: Callable[[Side], object]) -> None:
    """On all servers at once."""
    with ThreadPoolExecutor(len(sides)) as executor:
        list(executor.map(function, sides))


def joined_rooms(answer: Any) -> dict[str, Any]:
    """What the answer of a sync has of rooms."""
    rooms: dict[str, Any] = answer.get("rooms", {}).get("join", {})
    return rooms


def check(side: Side, case: Case) -> None:
    """That the answer is what is to be measured."""
    rooms = joined_rooms(side.readers[case.reader].sync(side.tokens[case.reader]))
    events = [event for room in rooms.values() for event in room["timeline"]["events"]]
    assert (len(rooms), len(events)) == ((0, 0) if case.what == IDLE else (1, 1))


def measure(sides: Sequence[Side], cases: Sequence[Case], rounds: int, requests: int) -> None:
    """Some rounds of each case; in a round the servers come by chance."""
    order = random.Random()  # noqa: S311
    for what in (IDLE, PLAIN, STICKY):
        everywhere(sides, Side.catch_up)
        if what != IDLE:
            for side in sides:
                side.send(sticky=what == STICKY)
        for case in cases:
            if case.what != what:
                continue
            for side in sides:
                check(side, case)
                side.batch(case.reader, WARM_UP)
            for _ in range(rounds):
                for side in order.sample(sides, len(sides)):
                    cpu_s, times_s = side.batch(case.reader, requests)
                    case.cpu_s[side.kind].append(cpu_s)
                    case.times_s[side.kind] += times_s


def say_cases(cases: Sequence[Case], starts: int) -> None:
    """The table."""
    line = "{:<11}{:<22}{:<21}{:>10}{:>10}{:>8}  {:<18}{}"
    titles = ("user in", "incremental /sync", "sticky events", "CPU", "latency", "ratio")
    say(line.format(*titles, "middle half", "medians of the starts"))
    for case in cases:
        for kind in KINDS:
            ratios = case.ratios(kind)
            quarters = statistics.quantiles(ratios, n=4)
            medians = case.medians(kind, starts)
            say(
                line.format(
                    *(case.reader, case.what, kind),
                    f"{statistics.median(case.cpu_s[kind]) * 1000:.3f} ms",
                    f"{statistics.median(case.times_s[kind]) * 1000:.2f} ms",
                    f"{statistics.median(ratios):.3f}",
                    f"{quarters[0]:.3f} to {quarters[2]:.3f}",
                    f"{min(medians):.3f} to {max(medians):.3f}",
                )
            )


def main() -> None:
    """Prints the table and which goals are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=8, help="how often the servers start")
    parser.add_argument("--rounds", type=int, default=10, help="of each start and case")
    parser.add_argument("--requests", type=int, default=10, help="in a row, to one server")
    args = parser.parse_args()
    cases = [Case(reader, what) for what in (IDLE, PLAIN, STICKY) for reader in ROOMS]
    with Lab() as lab:
        servers = lab.servers(*KINDS.values())
        say(f"Making {max(ROOMS.values())} rooms on each of {len(servers)} servers")
        with ThreadPoolExecutor(len(servers)) as executor:
            sides = list(executor.map(set_up, KINDS, servers))
        for start in range(args.starts):
            say(f"Start {start + 1} of {args.starts}")
            everywhere(sides, lambda side: side.server.restart())
            measure(sides, cases, args.rounds, args.requests)
    say_cases(cases, args.starts)
    missed = False
    for case in cases:
        ratio, error = case.estimate(MODULE, args.starts)
        if case.what != STICKY:
            verdict = "unclear: too much else goes on"
            if ratio + error <= MOST_RATIO:
                verdict = "met"
            elif ratio - error > MOST_RATIO:
                verdict, missed = "MISSED", True
            say(
                f"{case.reader}, {case.what}: {ratio:.3f} +- {error:.3f} of the CPU time "
                f"without the feature (at most {MOST_RATIO}): {verdict}"
            )
    if missed:
        sys.exit("That is more than it should be.")


if __name__ == "__main__":
    main()
