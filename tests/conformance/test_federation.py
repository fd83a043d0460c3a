"""What becomes of a room's graph of events, and of the server itself (F1, F2, E2, E4)."""

import pytest

from tests.conformance.conftest import TargetWith
from tests.conformance.target import Options, Target
from tests.lab import Peer, wait, wait_until
from tests.lab.client import sliding_sticky_events
from tests.lab.scene import Scene, enter

_NONE = dict.fromkeys(("per_server", "per_server_in_room", "per_sender", "per_room"))
_SLOW = {"federation": {**_NONE, "per_server": {"per_second": 3, "burst_count": 5}}}
_THRESHOLD = 10
"""From so many forward extremities on Synapse sends dummy events."""


@pytest.mark.requirement("F1")
def test_on_top_of_unknown_events(scene: Scene[Target]) -> None:
    unknown, _ = scene.peer.sticky(scene.room, scene.eve)
    scene.peer.advance(scene.room, unknown)
    known = scene.sticky()
    scene.wait_for_sections(unknown, known)


@pytest.mark.requirement("F2")
@pytest.mark.timeout(300)
def test_forward_extremities_are_brought_down(scene: Scene[Target]) -> None:
    events = [scene.peer.sticky(scene.room, scene.eve) for _ in range(45)]
    assert all(not said for said in scene.send(*(pdu for _, pdu in events)).values())
    scene.wait_until_there(*(event_id for event_id, _ in events))

    def extremities() -> list[str]:
        """At most ten of them are told: fewer than that are all."""
        made = scene.peer.to(scene.server).make_join(scene.room_id, scene.peer.user("guest"))
        made.raise_for_status()
        found: list[str] = made.json()["event"]["prev_events"]
        return found

    wait_until(
        lambda: len(extremities()) < _THRESHOLD, "fewer forward extremities", 3 * wait.patience_s
    )
    # There were more, however soon they were brought down: one event refers to as many.
    answers = [scene.peer.to(scene.server).event(event_id).json() for event_id in extremities()]
    assert _THRESHOLD in [len(answer["pdus"][0]["prev_events"]) for answer in answers]


@pytest.mark.requirement("E4")
def test_killed_while_events_wait(target_with: TargetWith, peer: Peer) -> None:
    scene = enter(target_with(Options(module=_SLOW)), peer)
    flood = scene.flood(60)
    newcomer_missed = scene.alice.send_sticky(scene.room_id)
    scene.server.kill_and_restart()
    last = scene.sticky()
    expected = {*flood, newcomer_missed, last}
    seen = scene.alice.collect_sticky(scene.room_id, expected, timeout_s=180)
    assert set(seen) == expected


@pytest.mark.requirement("E2")
@pytest.mark.timeout(900)
def test_with_postgres(postgres_target: Target, peer: Peer, other_peer: Peer) -> None:
    scene = enter(postgres_target, peer, "joined")
    old = [scene.alice.send_sticky(scene.room_id) for _ in range(3)]
    flood = scene.flood(100)
    scene.wait_until_there(flood[-1])
    of_bob_server = other_peer.join(scene.server, scene.room_id, other_peer.user("bob"))
    assert of_bob_server.room_id == scene.room_id
    wait_until(lambda: set(old) <= other_peer.events.keys(), "the newcomer to be sent them")
    bob = scene.server.user()
    bob.send_sticky(bob.create_room())
    answer = bob.sliding_sync()
    bob.join(scene.room_id)
    assert set(old) <= set(sliding_sticky_events(bob.sliding_sync(answer), scene.room_id))
    seen = bob.collect_sticky(scene.room_id, {*old, *flood}, timeout_s=180)
    assert set(seen) == {*old, *flood}
