"""What an event costs with the module, beside what it costs plain Synapse.

``python -m benchmarks.events``, or for a short look ``--starts 1 --events 20``; ``--workers`` for a
Synapse of many processes on Postgres, both with and without the module.

In each round servers with and without the module get as many events each, in turns. What counts is
the CPU time that their processes use meanwhile: its ratio in each round, and the median of the
rounds. A process is a percent or two faster or slower from its start on, so all are started several
times, and one more plain Synapse shows how much that is.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain

import attr

from tests.integration.rooms import limits, wait_until_persisted, wait_until_sticky
from tests.lab import Homeserver, Lab, Peer
from tests.lab.say import say
from tests.lab.scene import Scene, enter
from tests.lab.wait import wait_until

_FAR = {"per_second": 1_000, "burst_count": 100_000}
_CONFIG = {
    **limits(per_server=_FAR, per_server_in_room=_FAR, per_sender=_FAR, per_room=_FAR),
    "local": {"per_user": _FAR},
}
"""The limits count, and nobody is past one."""

_CPU_OF_PROCESS = 2
"""The kind of clock, in the ID that Linux gives to the CPU clock of another process."""

_WARM_UP = 20

Deployment = Scene[Homeserver]


@attr.s(auto_attribs=True, frozen=True)
class Kind:
    """A kind of event.

    happen: makes one happen, and waits until it is persisted.
    goal: how much the module's CPU time may be of plain Synapse's.
    """

    name: str
    happen: Callable[[Deployment], object]
    goal: float


def _receive(scene: Deployment, make: Callable[..., tuple[str, object]]) -> str:
    event_id, pdu = make(scene.room, scene.eve)
    scene.peer.advance(scene.room, event_id)
    assert scene.send(pdu) == {event_id: {}}
    return event_id


def _receive_plain(scene: Deployment) -> None:
    wait_until_persisted(scene.server, _receive(scene, scene.peer.make))


def _receive_sticky(scene: Deployment) -> None:
    wait_until_sticky(scene.server, _receive(scene, scene.peer.sticky))


KINDS = (
    Kind("local, plain", lambda scene: scene.alice.send(scene.room_id), 1.01),
    Kind("received, plain", _receive_plain, 1.01),
    Kind("local, sticky", lambda scene: scene.alice.send_sticky(scene.room_id), 1.03),
    Kind("received, sticky", _receive_sticky, 1.03),
)


def cpu_s(server: Homeserver) -> float:
    """The CPU time that the server's processes have used, to the microsecond."""
    clocks = (~process.pid << 3 | _CPU_OF_PROCESS for process in server.running())
    return sum(map(time.clock_gettime, clocks))


def cpu_of_each(kind: Kind, scenes: Sequence[Deployment], events: int) -> list[float]:
    """The CPU time of each server for as many events, in seconds. They get them in turns."""
    before_s = [cpu_s(scene.server) for scene in scenes]
    for number in range(events):
        first = number % len(scenes)
        in_turn = [*scenes[first:], *scenes[:first]]
        for scene in in_turn if number % 2 else reversed(in_turn):
            kind.happen(scene)
    after_s = [cpu_s(scene.server) for scene in scenes]
    return [after - before for after, before in zip(after_s, before_s, strict=True)]


@attr.s(auto_attribs=True)
class Ratios:
    """Of the CPU times, by start and round: the module's to plain Synapse's; and of two plain
    Synapses' to each other, where there are two."""

    module: list[list[float]] = attr.Factory(list)
    plain: list[list[float]] = attr.Factory(list)

    def take_in(self, plain_s: Sequence[Sequence[float]], module_s: Sequence[float]) -> None:
        """What the servers of a start used in each round, plain Synapses first."""
        rounds = list(zip(*plain_s, strict=True))
        self.module.append([m / statistics.mean(p) for m, p in zip(module_s, rounds, strict=True)])
        self.plain.append([max(p) / min(p) for p in rounds])


def _deployment(lab: Lab, peer: Peer, *, module: bool, workers: bool) -> Deployment:
    lab.prepare()
    make = lab.make_workers if workers else lab.make
    server: Homeserver = make(module=module, config=_CONFIG)
    server.first_start()
    return enter(server, peer)


def let_newcomer_settle(module: Deployment, scenes: Sequence[Deployment]) -> None:
    """The peer of the server with the module has just joined. What that costs for some seconds is
    not an event's cost. All servers get as many events meanwhile."""

    def is_settled() -> bool:
        for scene in scenes:
            scene.alice.send(scene.room_id)
        return not module.server.query("SELECT 1 FROM synapse_sticky_newcomers")

    wait_until(is_settled, "the newcomer to be settled", timeout_s=60)


def measure(found: dict[str, Ratios], number: int, args: argparse.Namespace) -> None:
    """Starts the servers, in another order each time, and takes in what each kind of event costs
    them."""
    which = [False, True] if args.workers else [False, True, False]
    which = [*which[number % len(which) :], *which[: number % len(which)]]
    # How fast a process is depends on it. So it is the same for all that are compared.
    os.environ["PYTHONHASHSEED"] = str(number + 1)
    with Lab() as lab, ExitStack() as stack:
        peers = [lab.peer() for _ in which]
        for peer in peers:
            stack.callback(peer.close)
        start = partial(_deployment, lab, workers=args.workers)
        scenes = [start(peer, module=module) for peer, module in zip(peers, which, strict=True)]
        let_newcomer_settle(scenes[which.index(True)], scenes)
        for kind in KINDS:
            cpu_of_each(kind, scenes, _WARM_UP)
            rounds = [cpu_of_each(kind, scenes, args.events) for _ in range(args.rounds)]
            by_server = list(zip(*rounds, strict=True))
            plain_s = [s for s, module in zip(by_server, which, strict=True) if not module]
            found[kind.name].take_in(plain_s, by_server[which.index(True)])


def main() -> None:
    """Prints one table; exits with an error if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=4, help="of all servers")
    parser.add_argument("--rounds", type=int, default=3, help="after each start, of each kind")
    parser.add_argument("--events", type=int, default=60, help="in a round, of each server")
    parser.add_argument("--workers", action="store_true", help="many processes, on Postgres")
    args = parser.parse_args()
    found = {kind.name: Ratios() for kind in KINDS}
    for number in range(args.starts):
        sys.stderr.write(f"start {number + 1} of {args.starts}\n")
        measure(found, number, args)
    is_missed = False
    say("| event | CPU beside plain Synapse's | goal | of each start | two plain ones differ by |")
    say("|---|---|---|---|---|")
    for kind in KINDS:
        ratios = found[kind.name]
        median = statistics.median(chain.from_iterable(ratios.module))
        is_missed |= median > kind.goal
        starts = sorted(map(statistics.median, ratios.module))
        differ = statistics.median(chain.from_iterable(ratios.plain)) - 1
        say(
            f"| {kind.name} | {median:.3f} | at most {kind.goal}"
            f" | {starts[0]:.3f} to {starts[-1]:.3f} | {'-' if args.workers else f'{differ:.3f}'} |"
        )
    if is_missed:
        sys.exit("A goal is missed.")


if __name__ == "__main__":
    main()
