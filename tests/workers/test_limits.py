"""What a limit is worth if one server's transactions reach several processes (L1, L2, L6)."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.integration.rooms import deferred, entered, limits
from tests.lab import Lab, Peer, WorkerHomeserver, wait_until
from tests.lab.scene import Scene, enter
from tests.lab.workers import RECEIVERS

pytestmark = [pytest.mark.workers, pytest.mark.requirement("E2", "L1", "L2", "L6")]

_BURST = 10
_MOST = 60
_NEVER = {"per_second": 0.001, "burst_count": _BURST}

Deploy = Callable[[dict[str, Any]], WorkerHomeserver]


@pytest.fixture
def deploy(lab: Lab) -> Iterator[Deploy]:
    """Starts ten processes with this configuration of the module."""
    lab.prepare()
    others = list(lab.servers_started)

    def deploy(config: dict[str, Any]) -> WorkerHomeserver:
        started = lab.make_workers(config=config)
        started.first_start()
        return started

    yield deploy
    lab.close_servers([server for server in lab.servers_started if server not in others])


def send(scene: Scene[WorkerHomeserver], count: int) -> bool:
    """The peer sends so many sticky events in one transaction; was it taken?"""
    events = []
    for _ in range(count):
        events.append(scene.peer.sticky(scene.room, scene.eve))
        scene.peer.advance(scene.room, events[-1][0])
    pdus = [pdu for _, pdu in events]

    def said() -> tuple[int, str | None] | tuple[()]:
        answer = scene.peer.to(scene.server).send(events[0][0][1:], pdus)
        found = answer.status_code, answer.json().get("errcode")
        # Synapse itself takes one transaction of a server at a time in each process.
        return () if found == (429, "M_UNKNOWN") else found

    answer = wait_until(said, "an answer")
    assert answer in {(200, None), (429, "M_LIMIT_EXCEEDED")}
    return answer == (200, None)


def until_refused(scene: Scene[WorkerHomeserver], count: int) -> int:
    """How many were taken until every receiving process had refused some twice, in turns."""
    taken, refused = 0, 0
    while refused < 2 * len(RECEIVERS):
        if send(scene, count):
            taken, refused = taken + count, 0
        else:
            refused += 1
    return taken


def test_what_waits_is_bounded_however_many_receive(deploy: Deploy, peer: Peer) -> None:
    """``max_deferred_per_server`` holds over all receivers: they ask the database."""
    deployment = deploy(limits(per_server=_NEVER, max_deferred_per_server=_MOST))
    taken = until_refused(enter(deployment, peer), 10)
    # The burst was let through, the rest waits; one transaction may be taken beyond.
    assert _MOST <= taken - _BURST <= _MOST + 10


def test_what_waits_is_bounded_if_all_receive_at_once(deploy: Deploy, peer: Peer) -> None:
    """Each may have begun with one transaction before it could know of the others'."""
    deployment = deploy(limits(per_server=_NEVER, max_deferred_per_server=_MOST))
    # Rooms of their own, so that none waits for the other's.
    scenes = [enter(deployment, peer) for _ in RECEIVERS]
    with ThreadPoolExecutor(len(scenes)) as executor:
        taken = sum(executor.map(lambda scene: until_refused(scene, 50), scenes))
    bursts = _BURST * len(deployment.persisters)
    assert _MOST <= taken - _BURST <= _MOST + 50 * len(RECEIVERS) + bursts

    def taken_in() -> int:
        return len(deferred(deployment)) + sum(
            len(entered(deployment, scene.room_id)) for scene in scenes
        )

    wait_until(lambda: taken_in() == taken, "all that was acknowledged to be taken in", 120)


def test_refusing_counts_for_each_receiver(deploy: Deploy, peer: Peer) -> None:
    """As docs/workers.md says: so much for each, and then the persister's own limit."""
    deployment = deploy(limits("reject", per_server=_NEVER))
    scene = enter(deployment, peer)
    assert until_refused(scene, 1) == _BURST * len(RECEIVERS)
    for name in RECEIVERS:
        assert f"refused 1 sticky events of {peer.name}" in deployment.output_of(name)

    def taken_in() -> tuple[int, int]:
        return len(entered(deployment, scene.room_id)), len(deferred(deployment))

    of_persister = (_BURST, _BURST * (len(RECEIVERS) - 1))
    wait_until(lambda: taken_in() == of_persister, "the persister's limit", 60, taken_in)
