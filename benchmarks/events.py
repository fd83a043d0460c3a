"""What an event costs with the module, beside what it costs plain Synapse.

``python -m benchmarks.events``, or for a short look ``--rounds 2 --events 20``; ``--workers`` for a
Synapse of many processes on Postgres, both with and without the module.

In each round two servers, one with the module and one without, get as many events each, in turns.
What counts is the CPU time that their processes use meanwhile: its ratio in each round, and the
median of the rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import attr

from tests.integration.rooms import limits, wait_until_persisted, wait_until_sticky
from tests.lab import Homeserver, Lab, Peer
from tests.lab.say import say
from tests.lab.scene import Scene, enter

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


def ratio(kind: Kind, plain: Deployment, module: Deployment, events: int) -> float:
    """Of the CPU times, in one round."""
    both = (plain, module)
    before_s = [cpu_s(scene.server) for scene in both]
    for number in range(events):
        for scene in both if number % 2 else reversed(both):
            kind.happen(scene)
    plain_s, module_s = (
        cpu_s(scene.server) - before for scene, before in zip(both, before_s, strict=True)
    )
    return module_s / plain_s


def _deployment(lab: Lab, peer: Peer, *, module: bool, workers: bool) -> Deployment:
    lab.prepare()
    make = lab.make_workers if workers else lab.make
    server: Homeserver = make(module=module, config=_CONFIG)
    server.first_start()
    return enter(server, peer)


def main() -> None:
    """Prints one table; exits with an error if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--events", type=int, default=60, help="in a round, of each server")
    parser.add_argument("--workers", action="store_true", help="many processes, on Postgres")
    args = parser.parse_args()
    with Lab() as lab, ExitStack() as stack:
        peers = [lab.peer() for _ in range(2)]
        for peer in peers:
            stack.callback(peer.close)
        start = partial(_deployment, lab, workers=args.workers)
        plain, module = (start(p, module=m) for p, m in zip(peers, (False, True), strict=True))
        is_missed = False
        say("| event | CPU beside plain Synapse's | goal | least and most of the rounds |")
        say("|---|---|---|---|")
        for kind in KINDS:
            ratio(kind, plain, module, _WARM_UP)
            found = [ratio(kind, plain, module, args.events) for _ in range(args.rounds)]
            median = statistics.median(found)
            is_missed |= median > kind.goal
            say(
                f"| {kind.name} | {median:.3f} | at most {kind.goal}"
                f" | {min(found):.3f} to {max(found):.3f} |"
            )
    if is_missed:
        sys.exit("A goal is missed.")


if __name__ == "__main__":
    main()
